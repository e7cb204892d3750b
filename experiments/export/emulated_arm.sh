#!/usr/bin/env bash
# Write FOLDER/python: an ARM64 Python with the runtimes of exports, run by QEMU. For a container with Debian, as root.
#   bash experiments/export/emulated_arm.sh FOLDER
#   python scripts/device_check.py EXPORT CHECKPOINT -- FOLDER/python scripts/device_worker.py
# Debian 12's QEMU 7.2 crashes on the newest runtimes: these are the newest that run. Later torch for ARM needs CUDA.
set -euo pipefail
runtimes="numpy ai-edge-litert==2.1.6 onnxruntime==1.27.0 executorch==1.1.0 torch==2.10.0"
runtimes+=" typing_extensions sympy mpmath networkx jinja2 markupsafe filelock fsspec flatbuffers packaging pyyaml"

folder=${1:?give the folder to write to}
mkdir -p "$folder/debs"
cd "$folder"
dpkg --add-architecture arm64
apt-get update -q
apt-get install -yq --no-install-recommends qemu-user-static
needed=$(apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces \
    --no-enhances python3:arm64 libstdc++6:arm64 | grep -E '^[a-z].*:arm64$' | sort -u)
(cd debs && apt-get download -q $needed)
for package in debs/*.deb; do dpkg-deb -x "$package" root; done

version=$(basename root/usr/bin/python3.* | sed s/python//)
platforms=$(printf -- '--platform manylinux_2_%s_aarch64 ' 17 27 28)
python3 -m pip install -q --no-deps --only-binary=:all: --python-version "$version" $platforms --target site $runtimes

cat >python <<EOF
#!/usr/bin/env bash
# Phones have had the Cortex-A76 since 2019; CPU=max has every instruction that QEMU knows.
exec qemu-aarch64-static -cpu "\${CPU:-cortex-a76}" -L "$PWD/root" -E PYTHONPATH="$PWD/site" \\
    -E LD_LIBRARY_PATH="$PWD/root/lib/aarch64-linux-gnu:$PWD/root/usr/lib/aarch64-linux-gnu" \\
    "$PWD/root/usr/bin/python$version" "\$@"
EOF
chmod +x python
