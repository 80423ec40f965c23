"""The code of docs/applications.md: as the files that it says it is, and run as a reader would run them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import psycopg
from psycopg.conninfo import conninfo_to_dict

from tests import nodejs

ROOT: Final = Path(__file__).parent.parent
PAGE: Final = ROOT / "docs" / "applications.md"
FENCE: Final = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAMED: Final = {
    "sql": re.compile(r"-- (\S+\.sql)\n"),
    "python": re.compile(r"# (\S+\.py)\n"),
    "js": re.compile(r"// (\S+\.mjs)\n"),
    "sh": re.compile(r"# (\S+\.sh)\n"),
}
LIMIT_SECONDS: Final = 60.0


def blocks() -> list[tuple[str, str]]:
    """Language and text of each block of code, in order."""
    return [(language, text) for language, text in FENCE.findall(PAGE.read_text("utf-8"))]


def files() -> dict[str, str]:
    """The blocks that are to be run: name and text."""
    found: dict[str, str] = {}
    for language, text in blocks():
        if language in NAMED:
            named = NAMED[language].match(text)
            if language == "sh" and not named:
                continue  # installs packages
            assert named, f"a block of {language} lacks the name of its file:\n{text}"
            assert named[1] not in found, f"there are two of {named[1]}"
            found[named[1]] = text
    return found


def statements(text: str) -> list[str]:
    """The statements of a file of SQL, sent one by one as psql does."""
    lines = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("--"))
    return [statement.strip() for statement in re.split(r";(?: *--.*)?\n", lines) if statement.strip()]


class Reader:
    """A developer who has all files of the page in a folder, and runs some of them. Each is noted in `ran`."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.folder = folder
        self.settings = settings
        self.ran: set[str] = set()
        for name, text in files().items():
            path = folder / name
            path.parent.mkdir(exist_ok=True, parents=True)
            path.write_text(text, "utf-8")

    def sql(self, name: str, connection: psycopg.Connection[Any]) -> list[list[tuple[Any, ...]]]:
        """Run a file of SQL; the rows of each statement that gives any."""
        self.ran.add(name)
        cursors = [connection.execute(statement.encode()) for statement in statements(files()[name])]
        return [cursor.fetchall() for cursor in cursors if cursor.description]

    def shell(self, name: str, more: str) -> str:
        """Run a file of shell commands, and more after it; what it prints."""
        self.ran.add(name)
        text = f"set -eu\n{files()[name]}{more}\n"
        command = ["sh", "-c", text]
        return subprocess.run(
            command, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, text=True, timeout=30, check=True
        ).stdout

    def run(self, name: str, code: str) -> Any:
        """Import a file of Python or Node as `page`, and run code that knows it; what it returns, by way of JSON."""
        ran = subprocess.run(
            self._command(name, code),
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=LIMIT_SECONDS,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
        return json.loads(ran.stdout)

    @contextmanager
    def running(self, name: str, code: str) -> Iterator[list[Any]]:
        """Run code beside the test for the length of a `with` block; the JSON of each line that it prints."""
        lines: list[Any] = []
        with subprocess.Popen(
            self._command(name, code), cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout
            reading = threading.Thread(target=_take, args=(process.stdout, lines.append), daemon=True)
            reading.start()
            try:
                yield lines
                assert process.poll() is None, "it ended by itself"
            finally:
                process.kill()
                reading.join()

    def install(self) -> None:
        """What `npm install` does."""
        modules = self.folder / "node_modules"
        if not modules.exists():
            modules.symlink_to(nodejs.modules())

    @property
    def environment(self) -> dict[str, str]:
        """What its programs are given."""
        path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
        return {"PATH": path, "HOME": str(self.folder), **self.settings}

    def _command(self, name: str, code: str) -> list[str]:
        self.ran.add(name)
        code = textwrap.dedent(code).strip()
        if name.endswith(".py"):
            module = name.removesuffix(".py").replace("/", ".")
            lines = (
                "import importlib, json",
                *(["import django_project"] if (self.folder / "django_project.py").exists() else []),
                f"page = importlib.import_module({module!r})",
                "def main():",
                textwrap.indent(code, "    "),
                "found = main()",
                "print(json.dumps(found, default=str), flush=True)",
            )
            return [sys.executable, "-W", "error", "-c", "\n".join(lines)]
        self.install()
        lines = (
            f'const page = await import("./{name}");',
            f"const main = async () => {{\n{code}\n}};",
            "console.log(JSON.stringify((await main()) ?? null));",
            "process.exit(0);",
        )
        return ["node", "--input-type=module", "--eval", "\n".join(lines)]


def _take(stream: Any, heard: Callable[[Any], None]) -> None:
    for line in stream:
        heard(json.loads(line))


# --- What both the database's tests and those of the whole system do with the page's files


def as_login(database_url: str, login: str) -> str:
    """The same database, for a login that the page makes."""
    parts = conninfo_to_dict(database_url)
    return f"postgresql://{login}:change%20me@{parts['host']}:{parts['port']}/{parts['dbname']}"


LISTENER: Final = "the listener"
"""A connection's name."""

CUT: Final = "select pg_terminate_backend(pid) from pg_stat_activity where application_name = %s"

HEAR: Final = {
    "changes.py": """
    class Told(page.Cache):
        def forget(self, user_id):
            super().forget(user_id)
            print(json.dumps([user_id, self.get(user_id)]), flush=True)
        def forget_all(self):
            super().forget_all()
            print(json.dumps(["everybody", None]), flush=True)
    page.listen(Told(), every=EVERY)
""",
    "changes.mjs": """
    const tell = (...said) => console.log(JSON.stringify(said));
    class Told extends page.Cache {
      forget(userId) {
        super.forget(userId);
        this.get(userId).then((row) => tell(userId, row));
      }
      forgetAll() {
        super.forgetAll();
        tell("everybody", null);
      }
    }
    await page.listen(new Told(), { every: EVERY * 1000 });
""",
}
"""Code for each that prints what a cache is told, and what it then reads. EVERY is to be replaced by seconds."""
