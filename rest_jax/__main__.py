"""`python -m rest_jax`."""

import sys

from rest_jax.cli import main

sys.exit(main())
