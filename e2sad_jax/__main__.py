"""Lists the commands, which are beside the package in a checkout and inside of it in a wheel."""

import importlib.util
import runpy

if __name__ == "__main__":
    inside = importlib.util.find_spec("e2sad_jax.experiments")
    runpy.run_module("e2sad_jax.experiments" if inside else "experiments", run_name="__main__", alter_sys=True)
