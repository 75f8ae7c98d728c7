"""Make an environment in which the real clients of our checkpoints run beside this package.

    python tests/interop/make_env.py            # .venv-interop, from the environment that runs this script

The clients pin other versions of what we share, so they come without their dependencies, and into an environment of
their own that sees ours: nothing of ours is upgraded.
"""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLACE = ROOT / ".venv-interop"
# What the clients import and we do not have already.
CLIENTS = ["dflash==0.1.0", "speculators==0.9.0", "hs-connectors"]
HELPERS = ["pydantic-settings", "pydantic", "loguru", "openai", "httpx", "rich"]


def main() -> None:
    """Create `.venv-interop` and install the clients."""
    venv.create(PLACE, with_pip=True, clear=True)
    python = PLACE / "bin" / "python"
    site = Path(
        subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        ).strip()
    )
    # Ours comes behind its own, so that a client's helper never hides one of ours from us.
    (site / "specauf-environment.pth").write_text(f"{sysconfig.get_path('purelib')}\n{ROOT}\n")
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-deps", *CLIENTS], check=True)
    subprocess.run([*pip, *HELPERS], check=True)
    check = "import torch, transformers, dflash, speculators; print('torch', torch.__version__, 'transformers', transformers.__version__)"
    subprocess.run([python, "-c", check], check=True)
    print(f"run: {python} -m pytest tests/interop -m slow", file=sys.stderr)


if __name__ == "__main__":
    main()
