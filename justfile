# Every chore of this repository. `just` alone lists them.

# The environment that holds this `just` (the README's commands put it into .venv), else whatever is on PATH.
own_bin := parent_directory(just_executable())
bin := if path_exists(own_bin / "python") == "true" { own_bin + "/" } else { "" }
python := bin + "python"
sources := "proteus_cache tests pipelines benchmarks docs"

_default:
    @{{ quote(just_executable()) }} --justfile {{ quote(justfile()) }} --list --unsorted

# Format the code and mend what ruff can mend
fmt:
    {{ python }} -m ruff format {{ sources }}
    {{ python }} -m ruff check --fix {{ sources }}

# Check format and style, changing nothing
lint:
    {{ python }} -m ruff format --check {{ sources }}
    {{ python }} -m ruff check {{ sources }}

# Check types, strictly
types:
    {{ python }} -m mypy

# Run all tests, one process a core; arguments go to pytest: `just test -k knn`, `just test -n 0` for one after another
test *args:
    {{ python }} -m pytest -n auto --maxprocesses 8 --dist worksteal {{ args }}

# The long variants of the reliability tests: hours of crashes, faults and damage
nightly *args:
    {{ python }} -m pytest -n auto --maxprocesses 8 --dist worksteal -m nightly --timeout 28800 {{ args }}

# Build the documentation into docs/_build/html; a warning is an error
docs:
    {{ python }} -m sphinx -W --keep-going -q -b html -d docs/_build/doctrees docs docs/_build/html

# What to run before a commit: format, style, types, documentation and the tests that are not slow
check: lint types docs
    {{ python }} -m pytest -q -m "not slow and not nightly"

# Exactly what CI runs: a fresh environment, style, types, documentation and the README's test command
ci:
    .ci/run

# Run every benchmark (some minutes, best on an idle machine)
bench:
    for script in benchmarks/*.py; do echo "== $script"; {{ python }} -m benchmarks.$(basename "$script" .py) || exit 1; done

# The demo: the whole way on images drawn here; what the README's first command runs
demo *args:
    {{ python }} -m proteus_cache demo {{ args }}
