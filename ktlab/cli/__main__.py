import sys

from ktlab.cli import main

sys.exit(main())
