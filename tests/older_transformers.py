"""Does an older transformers, in an environment of its own, see in our folders what it sees in those they came from?

    python -m venv OLD; OLD/bin/pip install transformers==4.57.3 torch
    PYTHONPATH=src:tests .venv/bin/python tests/older_transformers.py write FOLDER
    OLD/bin/python tests/older_transformers.py compare FOLDER

No test of the suite: that has one transformers alone.
"""

import sys
from pathlib import Path


def write(folder: Path) -> None:
    """With the project's own transformers: published folders, what left of them, and what left of seeded weights."""
    from checkpoint.test_export import CASES, exported
    from support.published import write_config, write_published
    from support.runs import run_of

    for number, case in enumerate(CASES.values()):
        if case.turned:
            source = folder / f"{number}-{case.family}"
            write_published(case.config(), case.family, source / "came", dtype=case.dtype)
            changes = {"dtype": "float32", "output": str(source / "left")}
            exported(run_of(source / "came", case.vision, case.language, weights="pretrained", **changes))
            write_config(case.config(), source / "config")
            changes = {"dtype": "float32", "output": str(source / "seeded")}
            exported(run_of(source / "config", case.vision, case.language, **changes))


def compare(folder: Path) -> None:
    """With an older one."""
    import torch
    import transformers

    failed = False
    for source in sorted(folder.iterdir()):
        states, missing = [], []
        for name in ("came", "left", "seeded"):
            model, said = transformers.AutoModelForImageTextToText.from_pretrained(source / name, output_loading_info=True)
            assert not said["unexpected_keys"] and not said["mismatched_keys"], (source / name, said)
            states.append(model.state_dict())
            missing.append(set(said["missing_keys"]))
        came, left, _ = states
        same = missing[0] == missing[1] and all(torch.equal(left[key], came[key]) for key in came.keys() - missing[0])
        failed |= not same or bool(missing[2])
        print(f"{source.name}: {'same' if same else 'DIFFERS'}; missing: {missing}")
    sys.exit(failed)


if __name__ == "__main__":
    {"write": write, "compare": compare}[sys.argv[1]](Path(sys.argv[2]))
