"""Look at built pages in a browser: ``python docs/look_at_pages.py build/docs``.

Chromium, without a window, opens every page in frames of 1280 and 500 pixels. No page may scroll sideways, leave a
formula as TeX, or ask another machine for anything; what does is printed, and the exit status is 1.
"""

from __future__ import annotations

import http.server
import json
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
WIDTHS = (1280, 500)
LIMIT = 300  # seconds for all pages

# Loads each page in a frame, waits for its formulas, and hands in what is wrong with it.
DRIVER = """<!doctype html><body><script>
async function look(page, width) {
  const frame = document.createElement("iframe");
  frame.style.cssText = `width: ${width}px; height: 900px; border: 0`;
  frame.src = page;
  document.body.append(frame);
  await new Promise(loaded => frame.onload = loaded);
  const view = frame.contentWindow, root = view.document.documentElement, wrong = [];
  const formulas = view.document.querySelectorAll(".math").length;
  if (formulas && view.MathJax?.startup?.promise) await view.MathJax.startup.promise;
  const done = view.document.querySelectorAll(".math mjx-container:not(mjx-container mjx-container)").length;
  if (done < formulas) wrong.push(`${formulas - done} of ${formulas} formulas are raw TeX`);
  if (view.document.querySelector("mjx-merror")) wrong.push("a formula has an error");
  if (root.scrollWidth > root.clientWidth) {
    const over = [...view.document.body.querySelectorAll("*")].filter(
      element => element.getBoundingClientRect().right > root.clientWidth + 1).map(
      element => `${element.localName}.${element.className}: ${element.textContent.trim().slice(0, 40)}`);
    wrong.push(`is ${root.scrollWidth} wide (${over.slice(0, 3).join("; ")})`);
  }
  for (const entry of view.performance.getEntriesByType("resource"))
    if (new URL(entry.name).origin !== location.origin && !entry.name.startsWith("data:"))
      wrong.push(`asks for ${entry.name}`);
  frame.remove();
  return wrong.map(what => `${page} at ${width} pixels ${what}`);
}
(async () => {
  const {pages, widths} = await (await fetch("/.pages")).json(), wrong = [];
  for (const page of pages) for (const width of widths) wrong.push(...await look(page, width));
  await fetch("/.done", {method: "POST", body: JSON.stringify(wrong)});
})();
</script></body>"""


class Pages(http.server.SimpleHTTPRequestHandler):
    """The files of a directory, the driver, and what the driver hands in."""

    pages: Sequence[str] = ()
    found: Sequence[str] | None = None
    done = threading.Event()

    def do_GET(self) -> None:
        """Serve a file, or what the driver asks for."""
        if self.path == "/.driver":
            self.answer(DRIVER, "text/html; charset=utf-8")
        elif self.path == "/.pages":
            self.answer(json.dumps({"pages": self.pages, "widths": WIDTHS}), "application/json")
        else:
            super().do_GET()

    def do_POST(self) -> None:
        """Take what the driver found."""
        type(self).found = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.answer("", "text/plain")
        self.done.set()

    def answer(self, text: str, kind: str) -> None:
        """Send a text."""
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        """Nothing: requests are no news."""


def find_browser() -> str | None:
    """Path of a Chromium, or None."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def look(directory: Path, browser: str) -> Sequence[str]:
    """What is wrong with the pages of a directory, a line each."""
    names = sorted(
        str(path.relative_to(directory)) for path in directory.rglob("*.html") if "_static" not in path.parts
    )
    handler = type("Handler", (Pages,), {"pages": names, "done": threading.Event()})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(directory)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # Other machines do not exist for this browser: what asks for them is found, and not sent.
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--no-first-run"]
    options.append("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [browser, *options, f"--user-data-dir={profile}", f"http://127.0.0.1:{server.server_port}/.driver"]
        running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            if not handler.done.wait(LIMIT):
                return [f"the browser did not come to its end in {LIMIT} s"]
        finally:
            running.terminate()
            running.wait()
            server.shutdown()
            server.server_close()
    return handler.found or []


def main(arguments: Sequence[str]) -> int:
    """Look, print, and give the exit status."""
    browser = find_browser()
    if browser is None:
        print(f"going on without a look at the pages: none of {', '.join(BROWSERS)} is installed")
        return 0
    wrong = look(Path(arguments[0]), browser)
    print("\n".join([*wrong, f"{len(wrong)} faults"]))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
