"""Signatures read without importing torch, numpy and timm equal the real ones, and mistakes are found without torch."""

import json
import pkgutil
import re
import subprocess
import sys

from sam_distill.cli.app import default_conf_dir
from sam_distill.config.check import parameters, type_name

TARGETS = sorted({target for path in default_conf_dir().rglob("*.yaml")
                  for target in re.findall(r"^_target_: (\S+)", path.read_text(), re.MULTILINE)})  # fmt: skip
DESCRIBE = """
import json, sys
from sam_distill.config.check import parameters, type_name
from sam_distill.config.signatures import resolve
found = {target: {n: [type_name(p.annotation), repr(p.default)] for n, p in parameters(resolve(target)).items()}
         for target in sys.argv[1:]}
assert not sys.modules.keys() & {"torch", "numpy", "timm"}
print(json.dumps(found))
"""
MISTAKE = "import sys; from sam_distill.cli.app import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"


def test_signatures_are_the_same_without_libraries() -> None:
    done = subprocess.run([sys.executable, "-c", DESCRIBE, *TARGETS], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    for target in TARGETS:
        real = parameters(pkgutil.resolve_name(target))
        assert found[target].keys() == real.keys()
        for name, (annotation, default) in found[target].items():
            assert default == repr(real[name].default)
            if not (target.endswith("Hardware") and "Any" in annotation):  # Lightning's types, such as Profiler
                wanted = type_name(real[name].annotation)  # typing keeps the order in which it first saw a union
                assert sorted(annotation.split(" or ")) == sorted(wanted.split(" or ")), (target, name)


def test_mistakes_do_not_wait_for_torch() -> None:
    words = ["train", "encoder=tinyvt", "batch_size=many", "+strategy.typo=1"]
    done = subprocess.run([sys.executable, "-c", MISTAKE, *words], capture_output=True, text=True, check=True)
    assert [line.partition(" ")[2].partition(" ")[0] for line in done.stderr.splitlines()] == [
        "encoder=tinyvt:", "batch_size=many", "strategy.typo=1",
    ]  # fmt: skip
