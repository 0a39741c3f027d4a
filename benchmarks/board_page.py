"""How long the board's page takes to sort, filter and unfold in Chromium: 1,000 arms x 5 tasks x 5 seeds, from file://.

    python benchmarks/board_page.py [--arms 1000] [--seeds 5] [--repeats 7]

Printed is, for each action, the least of the repeats: milliseconds until the new rows are laid out, and until the frame
that shows them has been drawn.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from harness.report.pages.board import Beside, render_board
from tests.browser import Browser, find_chromium
from tests.report.pages.boards import board

ACTIONS = {
    "sort by a task": "document.querySelectorAll('button.sort')[1 + turn % 5].click()",
    "sort by name": "document.querySelectorAll('button.sort')[0].click()",
    "filter": "find.value = ['dpo', 'sft helpful', 'harmless base1'][turn % 3]; find.dispatchEvent(new Event('input'))",
    "clear the filter": "find.value = turn % 2 ? 'dpo' : ''; find.dispatchEvent(new Event('input'))",
    "choose a factor": "facet.value = ['dpo', 'sft', ''][turn % 3]; facet.dispatchEvent(new Event('change'))",
    "unfold one row": "document.querySelector('button.fold').click()",
}
MEASURE = """(async () => {
  const find = document.getElementById('find'), facet = document.querySelectorAll('select.facet')[1];
  const frame = () => new Promise(done => requestAnimationFrame(() => {
    const channel = new MessageChannel(); channel.port1.onmessage = done; channel.port2.postMessage(0); }));
  const turn = TURN;
  await frame();
  const start = performance.now();
  ACTION;
  document.body.offsetHeight;
  const laid = performance.now() - start;
  await frame();
  return [laid, performance.now() - start];
})()"""


def main() -> None:
    """Write the page, open it, print what each action took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("arms", 1000), ("seeds", 5), ("repeats", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    chromium = find_chromium()
    if chromium is None:
        sys.exit("no Chromium (Debian: apt-get install chromium)")
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "report.html"
        began = time.process_time()
        file.write_text(render_board(board(asked.arms, seeds=asked.seeds, bases=4), Beside()), encoding="utf-8")
        print(f"rendered in {time.process_time() - began:.1f} s of processor, {file.stat().st_size:,} bytes")
        browser = Browser(chromium)
        try:
            with browser.page(file.as_uri()) as page:
                for name, action in ACTIONS.items():
                    code = [MEASURE.replace("TURN", str(n)).replace("ACTION", action) for n in range(asked.repeats)]
                    laid, drawn = zip(*(page.run(one) for one in code), strict=True)
                    print(f"{name:18} {min(laid):6.1f} ms laid out, {min(drawn):6.1f} ms drawn")
        finally:
            browser.close()


if __name__ == "__main__":
    main()
