"""S6: what no source of the package may do, found in its syntax trees; and the versions that close known holes."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import proteus_cache

_PACKAGE = Path(proteus_cache.__file__).parent

_MODULES = {
    *("pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "dbm", "code", "codeop"),
    *("subprocess", "pty", "urllib", "http", "ftplib", "smtplib", "telnetlib", "socketserver", "xmlrpc", "requests"),
    *("httpx", "aiohttp", "fsspec", "s3fs", "huggingface_hub", "ctypes", "cffi", "runpy", "socket", "webbrowser"),
}
_CALLS = {
    *("eval", "exec", "compile", "__import__"),
    *("os.system", "os.popen", "os.execv", "os.execvp", "os.execve", "os.execl", "os.execlp", "os.posix_spawn"),
    *("os.startfile", "os.spawnl", "os.spawnv", "torch.load", "torch.hub.load", "torch.save", "torch.jit.load"),
    *("torch.hub.load_state_dict_from_url", "np.load", "numpy.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load"),
    *("numpy.fromregex", "pandas.read_pickle", "wds.WebDataset", "webdataset.WebDataset", "webdataset.gopen"),
    *("zarr.open", "zarr.open_array", "zarr.open_group", "zarr.load", "tarfile.open", "zipfile.ZipFile"),
    *("shutil.unpack_archive", "importlib.import_module"),
}
_ARGUMENTS = {("shell", True), ("allow_pickle", True), ("weights_only", False), ("trust_remote_code", True)}

_ALLOWED = {
    ("__init__.py", "import import_module"): "imports a module of ours by a name from a table in the code",
    ("cli/__init__.py", "exec"): "runs the empty text, which makes Python forget an interruption",
    (
        "codecs/__init__.py",
        "import import_module",
    ): "imports a codec's module of ours by a name from a table in the code",
    ("pack/worker.py", "import subprocess"): "starts our own reader process, with arguments as a list",
    ("pipeline/run.py", "import subprocess"): "starts our own commands, with arguments as a list",
    ("processes.py", "import socket"): "asks the system for a free port, for the processes of one run",
    ("teachers/download.py", "import http"): "the one module that downloads: published weights, by URLs in the code",
    ("teachers/download.py", "import urllib"): "likewise",
    ("teachers/timm_model.py", "import huggingface_hub"): "asks whether the hub answers; names come from timm",
    ("teachers/weights.py", "import pickle"): "names the error that the restricted unpickler raises; nothing is loaded",
    ("teachers/weights.py", "torch.load"): "of a `.pth` that the user names, with weights_only=True",
    ("workers.py", "import ctypes"): "names the type of a flag in shared memory",
    ("yaml_text.py", "yaml.load"): "with a SafeLoader: plain values",
}
"""(file, what) to the reason why it may stand there."""


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return "?"


def _found(source: str) -> Iterator[str]:
    """What a source does that it should not."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (f"import {a.name.split('.')[0]}" for a in node.names if a.name.split(".")[0] in _MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            if node.module.split(".")[0] in _MODULES:
                yield f"import {node.module.split('.')[0]}"
            for alias in node.names:
                if f"{node.module}.{alias.name}" in _CALLS:
                    yield f"import {alias.name}"
        elif isinstance(node, ast.Call):
            if _dotted(node.func) in _CALLS:
                yield _dotted(node.func)
            for keyword in node.keywords:
                value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                if (keyword.arg, value) in _ARGUMENTS:
                    yield f"{keyword.arg}={value!r}"


def test_the_rules_see_what_they_forbid() -> None:
    source = """
import pickle, os.path
from marshal import loads
from importlib import import_module
import torch.hub as hub
eval("1"); os.system("x"); torch.load("x", weights_only=False); subprocess.run("x", shell=True); yaml.load(x)
"""

    assert list(_found(source)) == [
        "import pickle",
        "import marshal",
        "import import_module",
        "eval",
        "os.system",
        "torch.load",
        "weights_only=False",
        "shell=True",
        "yaml.load",
    ]


def test_no_source_does_what_could_run_or_fetch_what_a_store_says() -> None:
    found = {
        (path.relative_to(_PACKAGE).as_posix(), what)
        for path in sorted(_PACKAGE.rglob("*.py"))
        for what in _found(path.read_text())
    }

    assert found == _ALLOWED.keys(), "a source does something new, or a reason in the list is not needed any more"


def test_weights_are_unpickled_under_restrictions_only() -> None:
    tree = ast.parse((_PACKAGE / "teachers" / "weights.py").read_text())
    loads = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and _dotted(node.func) == "torch.load"]

    assert [{k.arg: ast.unparse(k.value) for k in load.keywords}["weights_only"] for load in loads] == ["True"]


def test_yaml_is_loaded_by_a_safe_loader() -> None:
    import yaml

    from proteus_cache import yaml_text

    assert issubclass(yaml_text._Loader, yaml.SafeLoader)


def test_the_floors_that_close_known_holes_stand() -> None:
    project = Path(__file__).parents[2] / "pyproject.toml"
    wanted = tomllib.loads(project.read_text())["project"]["dependencies"]

    # torch below 2.10: memory corruption by a restricted `.pth` (CVE-2026-24747); Pillow: see its notes of 12.2, 12.3.
    assert {"torch>=2.10", "pillow>=12.3"} <= set(wanted)
