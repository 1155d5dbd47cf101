"""Every benchmark in its full form, one after the other: what docs/performance.md shows, measured again.

Each one's table is written to NAME.txt and its ratios to NAME.json, in a folder named after the commit. One that is
there already is not measured again, so that a run that was stopped goes on where it was; one that fails leaves NAME.log
and does not keep the others from being measured. Nothing else should run on the machine meanwhile.

    python benchmarks/all.py [--quick] [--out FOLDER] [NAME ...]
"""

import argparse
import platform
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
MEASURED: dict[str, tuple[str, ...]] = {
    "layer": ("layer",),
    "round": ("round",),
    "round-512": ("round", "--only", "512"),
    "assignment": ("assignment",),
    "traffic": ("traffic",),
    "growth": ("growth",),
    "methods": ("methods",),
    "scoring": ("scoring",),
    "deployment": ("deployment",),
    "serving": ("serving",),
    "secure": ("secure",),
}
"""What is measured by name: a script of this folder and its words."""


def commit() -> str:
    """Name of the commit that is measured, with `-changed` where tracked files differ from it."""
    arguments = ["git", "-C", str(HERE), "describe", "--always", "--abbrev=7", "--exclude=*", "--dirty=-changed"]
    try:
        return subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "no-commit"


def measure(name: str, folder: Path, quick: bool) -> bool:
    """Run one benchmark; whether it came to its end. Its files appear when they are whole."""
    script, *arguments = MEASURED[name]
    ratios, log = folder / f"{name}.json.part", folder / f"{name}.log"
    arguments += ["--quick", "--json", str(ratios)] if quick else ["--json", str(ratios)]
    command = [sys.executable, str(HERE / f"{script}.py"), *arguments]
    started = time.monotonic()
    with log.open("w") as errors:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, check=False)
    if done.returncode:
        print(f"{name}: failed; see {log}", flush=True)
        return False
    seconds = time.monotonic() - started
    about = f"{commit()}, {platform.machine()}, {time.strftime('%Y-%m-%d')}, {seconds:.0f} s\n"
    (folder / f"{name}.txt").write_text(about + done.stdout)
    ratios.rename(folder / f"{name}.json")
    log.unlink()
    print(f"{name}: {seconds:.0f} s", flush=True)
    return True


def main() -> None:
    """Measure what has not been measured yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"only these: {', '.join(MEASURED)}")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that all of them run")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="benchmarks/results/COMMIT unless given")
    options = parser.parse_args()
    if unknown := set(options.names) - set(MEASURED):
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}")
    folder = options.out or HERE / "results" / (commit() + ("-quick" if options.quick else ""))
    folder.mkdir(parents=True, exist_ok=True)
    waiting = [name for name in options.names or MEASURED if not (folder / f"{name}.json").exists()]
    failed = [name for name in waiting if not measure(name, folder, options.quick)]
    sys.exit(f"{len(failed)} failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
