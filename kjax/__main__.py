"""`python -m kjax`."""

import sys

from kjax.cli import main

sys.exit(main())
