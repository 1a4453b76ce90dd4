"""Run the quick tests with other versions of Python and the libraries, and print a table.

    python tests/versions.py                    the Pythons found on PATH, each with the sets below
    python tests/versions.py ~/python3.10 --only oldest --pip "--index-url URL"

Each combination has a virtual environment in a temporary folder, which is removed afterwards: two
gigabytes, and some minutes. What cannot be installed is a line of the table, not an error.
"""
import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SETS = {
    "oldest": "numpy==1.26.0 scipy==1.14.0 pillow==10.3.0 tqdm==4.66.0 pytest==8.0.0",
    "newest": "numpy scipy pillow tqdm pytest"}
TORCH = "2.11.0", "2.13.0"
PYTHONS = "3.10", "3.11", "3.12", "3.13"


def run(*command, **options):
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)


def try_set(python, torch, libraries, more):
    """Return what happened, in a few words, and the versions that were installed."""
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder, "venv/bin/python")
        made = run(python, "-m", "venv", own.parent.parent)
        if made.returncode:
            return "no virtual environment", ""
        wanted = f"torch=={torch} {libraries} {more}".split()
        installed = run(own, "-m", "pip", "install", "--quiet", "--no-cache-dir", "--only-binary",
                        ":all:", *wanted)
        if installed.returncode:
            errors = [line for line in installed.stderr.splitlines() if line.startswith("ERROR")]
            return "cannot be installed: " + (errors or ["?"])[0][:60], ""
        frozen = run(own, "-m", "pip", "freeze").stdout
        versions = re.findall(r"^(?:numpy|scipy|pillow|tqdm|pytest)==.*", frozen, re.M | re.I)
        tests = run(own, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", "tests",
                    cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", tests.stdout, re.M)
        print(*failed, sep="\n", file=sys.stderr)
        return (tests.stdout + tests.stderr).splitlines()[-1], " ".join(versions)


def main():
    parser = argparse.ArgumentParser(description="Run the quick tests with other versions.")
    add = parser.add_argument
    add("pythons", nargs="*", help="interpreters; default: those on PATH")
    add("--torch", nargs="+", default=TORCH, help="versions of torch")
    add("--only", nargs="+", choices=SETS, default=list(SETS), help="sets of libraries")
    add("--pip", default="", help="more arguments of pip install, such as an index of CPU builds")
    args = parser.parse_args()
    paths = [shutil.which(f"python{name}") for name in PYTHONS]
    pythons = args.pythons or [path for path in paths if path]
    table = []
    for python in pythons:
        asked = run(python, "-c", "import platform; print(platform.python_version())")
        name = asked.stdout.strip() or python
        for torch in args.torch:
            for libraries in args.only:
                found, versions = try_set(python, torch, SETS[libraries], args.pip)
                table.append(f"Python {name:8} torch {torch:8} {libraries:7} {found:40} {versions}")
                print(table[-1], flush=True)
    print("", *table, sep="\n")


if __name__ == "__main__":
    main()
