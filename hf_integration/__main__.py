"""``python -m hf_integration SCRIPT ...``: see ``hf_integration.launch``."""

import sys

from hf_integration.launch import main

sys.exit(main())
