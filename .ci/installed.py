"""Run with a built wheel on the path, away from the repository: is everything in it?

python .ci/installed.py FOLDER
"""

import sys
from importlib.metadata import distributions
from pathlib import Path

folder = Path(sys.argv[1]).resolve()
sys.path.insert(0, str(folder))

import torch  # noqa: E402

import tnkfac  # noqa: E402
import tnkfac.__main__  # noqa: E402

assert Path(tnkfac.__file__).is_relative_to(folder), tnkfac.__file__
assert (folder / "tnkfac" / "py.typed").is_file()
top = {path.name for path in folder.iterdir() if path.suffix != ".dist-info"}
assert top == {"tnkfac"}, top
(found,) = (d for d in distributions(path=[str(folder)]) if d.name == "tnkfac")
for field in ("Summary", "License-Expression", "Requires-Python", "Description"):
    assert found.metadata.get(field) or found.metadata.get_payload(), field
assert found.version == tnkfac.__version__
extras = set(found.metadata.get_all("Provides-Extra") or ())
assert {"examples", "test", "trainers", "docs", "triton"} <= extras, extras
model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(8, 1))
for cls in (tnkfac.SINGD, tnkfac.KFAC):
    optimizer = cls(model.parameters())
    model(torch.randn(4, 1, 4, 4)).square().mean().backward()
    optimizer.step()
    assert all(row.approximation for row in optimizer.report())
    optimizer.close()
print(f"tnkfac {found.version} is whole.")
