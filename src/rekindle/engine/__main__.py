"""`python -m rekindle.engine --fd N`: an engine on the connected socket N. Started by a replica's supervisor."""

import argparse
import sys

from rekindle.clock import SystemClock
from rekindle.engine.engine import Engine
from rekindle.engine.process import serve

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="rekindle.engine")
    parser.add_argument("--fd", type=int, required=True)
    sys.exit(serve(parser.parse_args().fd, Engine, SystemClock()))
