"""`python -m rekindle.engine --fd N`: an engine on the connected socket N. Started by a replica's supervisor."""

import argparse
import sys
import time

if __name__ == "__main__":
    started_s = time.monotonic()
    from rekindle.clock import SystemClock
    from rekindle.engine.engine import Engine
    from rekindle.engine.process import serve

    parser = argparse.ArgumentParser(prog="rekindle.engine")
    parser.add_argument("--fd", type=int, required=True)
    descriptor = parser.parse_args().fd
    sys.exit(serve(descriptor, Engine, SystemClock(), imports_s=time.monotonic() - started_s))
