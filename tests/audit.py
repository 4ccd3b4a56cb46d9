"""Known vulnerabilities of pinned versions: `python tests/audit.py constraints.txt`, a part of `make lint`.

Exit 1 where one is known, or where pip-audit fails for another reason than the network. pip-audit says "No known
vulnerabilities found" with exit 0 also where it skipped every package, so what was not audited is counted and said.
To live with a vulnerability, add `--ignore-vuln ID` to the command with a comment that says when and why.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

COMMAND = [sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip", "--format", "json"]
COMMAND += ["--progress-spinner", "off", "--timeout", "15"]
NO_SERVICE = re.compile(r"ConnectionError|ConnectTimeout|ReadTimeout|HTTPError|network may be blocking")


def verdict(answer: str, errors: str) -> tuple[int, str]:
    """Exit code and lines to print, from what pip-audit wrote."""
    try:
        packages = json.loads(answer)["dependencies"]
    except json.JSONDecodeError:
        errors = errors.strip() or "it said nothing"
        if NO_SERVICE.search(errors):
            return 0, f"not audited: the vulnerability service cannot be reached ({errors.splitlines()[-1][:150]})"
        return 1, f"pip-audit failed: {errors[-1000:]}"
    found = [
        f"{package['name']} {package['version']}: {flaw['id']}, mended in {', '.join(flaw['fix_versions']) or 'none'}"
        for package in packages
        for flaw in package.get("vulns", [])
    ]
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    audited = len(packages) - len(skipped)
    if not audited:
        return 0, f"not audited: the vulnerability service knows none of {len(packages)} pinned versions from here"
    lines = [*found, f"{audited} pinned versions audited, {len(found)} vulnerabilities known"]
    lines += [f"not audited: {', '.join(skipped)}"] * bool(skipped)
    return int(bool(found)), "\n".join(lines)


def main(pins: Path) -> int:
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as public:
        public.write(re.sub(r"\+\w+", "", pins.read_text()))  # PyPI knows torch 2.13.0, not 2.13.0+cpu
        public.flush()
        done = subprocess.run([*COMMAND, "--requirement", public.name], capture_output=True, text=True)
    code, lines = verdict(done.stdout, done.stderr)
    print(lines)
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
