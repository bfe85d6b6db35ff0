"""The entry point: `deepspeed launch/train.py [RECIPE] [key=value ...]`; torchrun and plain python work as well."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout works without being installed

from trainer.cli.train import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], default_recipe=Path(__file__).parent / "recipes" / "quickstart.yaml"))
