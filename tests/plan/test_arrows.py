import subprocess
import sys


def test_the_arithmetic_that_extract_and_train_open_with_knows_neither_of_them() -> None:
    code = (
        "import sys, proteus_cache.plan.extraction, proteus_cache.plan.training, proteus_cache.plan.rates;"
        "print([name for name in sys.modules if name.startswith(('proteus_cache.extract', 'proteus_cache.train', "
        "'torch', 'timm'))])"
    )

    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert found.stdout.strip() == "[]"
