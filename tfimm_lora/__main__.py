"""``python -m tfimm_lora`` is ``tfimm-lora``."""

import sys

from tfimm_lora.cli import main

sys.exit(main())
