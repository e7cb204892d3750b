"""Check a composed configuration before anything is built. The signatures of its `_target_`s are the only schema."""

import difflib
import functools
import inspect
import json
import re
import types
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException
from pydantic import ConfigDict, PydanticSchemaGenerationError, PydanticUserError, TypeAdapter, ValidationError

from sam_distill.config.signatures import resolve
from sam_distill.config.sources import Sources

RESERVED = {"_target_", "_partial_", "_recursive_", "_convert_", "_args_"}
RUN_DIR = "run_dir"  # a parameter of commands that keep a run folder: cli/jobs.py supplies it, not the configuration
_WANTS_OBJECT = {"needs_python_object", "dataclass_type", "callable_type"}  # pydantic's errors for "not plain data"
_PYDANTIC = re.compile("^Input |^Value error, | after validation")  # parts of messages that mean nothing to a user
_ABSENT = object()
MIN_SIMILARITY = 0.7  # least similarity to the typed name (difflib's ratio) at which a name is suggested


class Mistake(NamedTuple):
    """Wrong key, the value given for it (_ABSENT: none) and the message that says what is wrong."""

    key: str
    given: Any
    message: str


def check(cfg: DictConfig) -> list[str]:
    """Return all mistakes in the configuration of a command, one line each. Builds nothing."""
    sources = Sources(cfg)
    lines = []
    for key, given, message in _check_call(cfg, "", Any):
        head = key if given is _ABSENT else f"{key}={show(given)}"
        comment = sources.comment(key) if given == "???" else ""
        lines.append(f"{head} ({sources.where(key)}): {message}{comment and f' ({comment})'}")
    return list(dict.fromkeys(lines))


def keeps_run_folder(cfg: DictConfig) -> bool:
    """Whether the command writes records and results to a run folder."""
    return RUN_DIR in parameters(resolve(cfg._target_))


def parameters(target: Any) -> dict[str, inspect.Parameter]:
    """Return a callable's parameters by name, with annotations evaluated where possible.

    The `**more` of a class is replaced by the parameters of its base class; a `**more` with an annotation that names a
    callable, as in `Hardware`, by those of that callable. A callable with no readable signature accepts anything.
    """
    known = dict(_signature(target).parameters)
    for base in target.__mro__[1:-1] if inspect.isclass(target) else ():
        more = next((n for n, p in known.items() if p.kind is p.VAR_KEYWORD), None)
        if more is None:
            break
        del known[more]
        known = dict(_signature(base).parameters) | known
    for name, annotation in [(n, p.annotation) for n, p in known.items() if p.kind is p.VAR_KEYWORD]:
        if get_origin(annotation) is Annotated:
            del known[name]
            known = parameters(resolve(get_args(annotation)[1])) | known
    return known


def forwarded_options(node: DictConfig) -> list[str]:
    """Return the keys of a node that are arguments of the callable named in the annotation of the target's `**more`."""
    target = resolve(node._target_)
    own = _signature(target).parameters
    return [str(key) for key in node if key in parameters(target) and key not in own]


def nearest(name: str, names: Iterable[str]) -> str:
    """Return the dotted name closest to `name`, or "". An equal last part (`lr` for `optim.lr`) beats similarity."""
    known = sorted(names, key=lambda n: (n.count("."), n))
    ends, end = [n.rpartition(".")[2] for n in known], name.rpartition(".")[2]
    if end in ends:
        return known[ends.index(end)]
    if alike := difflib.get_close_matches(name, known, 1, MIN_SIMILARITY):
        return alike[0]
    alike = difflib.get_close_matches(end, ends, 1, MIN_SIMILARITY)
    return known[ends.index(alike[0])] if alike else ""


def show(value: Any) -> str:
    """Return a value as it would be typed, shortened to 60 characters."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _check_call(node: DictConfig, key: str, expected: Any) -> Iterator[Mistake]:
    """Yield the mistakes in one `_target_` node. expected: the annotation of the parameter that receives it."""
    name = _raw(node).get("_target_")
    try:
        target = resolve(name)
    except Exception as error:  # importing a module may raise anything
        yield Mistake(_join(key, "_target_"), name, f"can't be imported: {first_line(error)}")
        target = _unknown  # the arguments inside are still checked
    partial = bool(node.get("_partial_"))
    made = target if inspect.isclass(target) else _signature(target).return_annotation
    produced = functools.partial if partial else made
    if not _fits(produced, expected):
        yield Mistake(key, name, f"builds a {type_name(produced)}, expected {type_name(expected)}")

    known = {n: p for n, p in parameters(target).items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters(target).values())
    accepted = {n: p for n, p in known.items() if key or n != RUN_DIR}
    for field in map(str, node):
        if field in RESERVED or (not key and field == "hydra"):
            continue
        if field in accepted or anything:
            parameter = accepted.get(field, inspect.Parameter(field, inspect.Parameter.KEYWORD_ONLY))
            yield from _check_value(node, field, _join(key, field), parameter.annotation, parameter.default)
        else:
            guess = nearest(field, accepted)
            hint = f"did you mean {_join(key, guess)}?" if guess else f"it takes: {', '.join(accepted) or 'nothing'}"
            yield Mistake(_join(key, field), _raw(node)[field], f"{_name(target)} has no parameter {field}; {hint}")
    if not partial and "_args_" not in node:
        for field, parameter in accepted.items():
            if parameter.default is parameter.empty and field not in list(node):
                full = _join(key, field)
                wanted = type_name(parameter.annotation)
                yield Mistake(full, _ABSENT, f"missing, {_name(target)} needs it, expected {wanted}; give +{full}=...")


def _check_value(
    parent: DictConfig | ListConfig, field: Any, key: str, expected: Any, default: Any
) -> Iterator[Mistake]:
    if OmegaConf.is_missing(parent, field):
        yield Mistake(key, "???", f"no value given, expected {type_name(expected)}; give {key}=...")
        return
    raw = _raw(parent)[field]
    if "${hydra:" in str(raw) and not (isinstance(raw, dict) and "_target_" in raw):
        return  # known only when the job runs, such as the folder of an earlier job
    try:
        value = parent[field]
        if isinstance(value, DictConfig) and "_target_" in value:
            yield from _check_call(value, key, expected)
            return
        plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    except InterpolationToMissingValueError:
        return  # the missing value is reported at its own key
    except OmegaConfBaseException as error:
        yield Mistake(key, raw, f"can't be resolved: {first_line(error)}")
        return
    if isinstance(value, (DictConfig, ListConfig)) and _holds_nodes(plain):
        entry = _entry(expected, type(plain))
        if entry is None:
            yield Mistake(key, plain, f"a {type(plain).__name__} of nodes, expected {type_name(expected)}")
            return
        for child in value if isinstance(value, DictConfig) else range(len(value)):
            yield from _check_value(value, child, _join(key, str(child)), entry, inspect.Parameter.empty)
    elif plain is not default and (message := _leaf_mistake(plain, expected)):
        yield Mistake(key, plain, message + _about_quotes(key, plain, expected))


def _leaf_mistake(value: Any, expected: Any) -> str:
    """Return why plain data does not fit an annotation; "" if it does."""
    if isinstance(value, dict) and _entry(expected, dict) is None:
        return f"a mapping without _target_, expected {type_name(expected)}"
    try:
        # Strict JSON has YAML's types: a list is valid for a tuple, an int for a float, a string for a Path; no more.
        _adapter(expected).validate_json(json.dumps(value, default=str), strict=True)
    except PydanticSchemaGenerationError:
        return ""  # an annotation that pydantic can't handle allows anything
    except ValidationError as failed:
        errors = failed.errors()
        if any(error["type"] in _WANTS_OBJECT for error in errors):
            return f"expected {type_name(expected)}, a node with _target_"
        tuples = [get_args(member) for member in _members(expected) if get_origin(member) is tuple]
        lengths = [len(entries) for entries in tuples if ... not in entries]
        if lengths and isinstance(value, list) and len(value) not in lengths:
            return f"should have {lengths[0]} values, not {len(value)}"
        message = " or ".join(dict.fromkeys(_PYDANTIC.sub("", error["msg"]) for error in errors))
        choices = [str(c) for m in _members(expected) if get_origin(m) is Literal for c in get_args(m)]
        guess = nearest(str(value), choices)
        return f"{message}; did you mean {guess}?" if guess else message
    return ""


def _about_quotes(key: str, value: Any, expected: Any) -> str:
    """Return a hint if a wrong value would be valid with quotes or without them; else ""."""
    if isinstance(value, str):
        try:
            bare = yaml.safe_load(value)
        except yaml.YAMLError:
            return ""
        unquoted = not isinstance(bare, str) and not _leaf_mistake(bare, expected)
        return f"; the quotes make it text: write {key}={value}" if unquoted else ""
    reads = {bool: "true or false", int: "a number", float: "a number"}.get(type(value))
    text = reads and not _leaf_mistake(str(value), expected)
    return f"; it reads as {reads}: for text quote it twice, {key}='\"...\"'" if text else ""


def _adapter(annotation: Any) -> TypeAdapter[Any]:
    annotation = Any if annotation is inspect.Parameter.empty or isinstance(annotation, str) else annotation
    try:
        return TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError:  # dataclasses and similar types have their own config
        return TypeAdapter(annotation)


def _unknown(**_: Any) -> Any:
    """Stand in for a target that can't be imported: accept any arguments, fit any annotation."""


def _signature(target: Any) -> inspect.Signature:
    try:
        return inspect.signature(target, eval_str=True)
    except NameError:  # a name imported for type checkers only: such annotations stay strings, which allow anything
        return inspect.signature(target)
    except (TypeError, ValueError):  # Python knows no signature, as for some built-ins
        return inspect.signature(_unknown)


def _members(annotation: Any) -> list[Any]:
    """Return the members of a union, or the annotation alone, without the constraints of `Annotated`."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _members(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [member for part in get_args(annotation) for member in _members(part)]
    return [annotation]


def _fits(produced: Any, expected: Any) -> bool:
    """Whether an object of class `produced` fits an annotation; True if that is uncertain."""
    produced = get_origin(produced) or produced
    if not inspect.isclass(produced) or produced in (Any, inspect.Parameter.empty):
        return True
    return any(_is_subclass(produced, get_origin(member) or member) for member in _members(expected))


def _is_subclass(produced: type, expected: Any) -> bool:
    if expected in (Any, inspect.Parameter.empty) or not inspect.isclass(expected):
        return expected is not Literal
    if str(expected) in map(str, produced.__mro__):  # by name: signatures.py loads a copy of the base class
        return True
    try:
        return issubclass(produced, expected)
    except TypeError:  # a protocol that can't be checked at run time
        return True


def _entry(annotation: Any, container: type) -> Any:
    """Return the annotation of the entries of a list or dict; None if the annotation accepts no such container."""
    for member in _members(annotation):
        origin = get_origin(member) or member
        if _is_subclass(container, Sequence if origin is tuple else origin):
            args = get_args(member)
            return Any if not args else args[-1] if container is dict else args[0]
    return None


def _holds_nodes(plain: Any) -> bool:
    if isinstance(plain, dict):
        return "_target_" in plain or any(map(_holds_nodes, plain.values()))
    return isinstance(plain, list) and any(map(_holds_nodes, plain))


def _raw(node: DictConfig | ListConfig) -> Any:
    """Return the content as written, with interpolations unresolved."""
    return OmegaConf.to_container(node, resolve=False)


def type_name(annotation: Any) -> str:
    if annotation is inspect.Parameter.empty:
        return "anything"
    names = [_name(m) if inspect.isclass(m) and not get_args(m) else str(m) for m in _members(annotation)]
    return re.sub(r"\b(\w+\.)+(?=\w)", "", " or ".join(names)).replace("NoneType", "null")


def _name(target: Any) -> str:
    return getattr(target, "__name__", str(target))


def _join(key: str, field: str) -> str:
    return f"{key}.{field}" if key else field


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if the message is empty."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
