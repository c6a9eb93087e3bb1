"""Twenty SIGKILLs at random moments of a training run, saves included; then all must be equal.

    python tests/kill_train.py [processes]

Trains a tiny dataset undisturbed, and again under kills with --resume, for one process or under
torchrun. Prints how far each run came, and whether weights and losses are bit-equal in the end.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import tiny_dataset  # noqa: E402
from test_train import flags, losses, start, weights  # noqa: E402


def main(processes: int, kills: int = 20) -> None:
    os.chdir(tempfile.mkdtemp())
    tiny_dataset(Path("data/tiny"))
    args = flags(max_iters=4000, eval_interval=20, log_interval=1, dropout=0.1, eval_images=2)
    began = time.time()
    whole = start("train.py", *args, "--out_dir=whole", processes=processes)
    whole.communicate()
    took = time.time() - began
    chance = random.Random(0)
    for kill in range(kills):
        run = subprocess.Popen(
            [sys.executable, __file__, "--child", str(processes), json.dumps(args)],
            start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        time.sleep(5 + chance.uniform(0, 1.3 * took / kills))
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        print(
            f"kill {kill + 1}: {len(losses('parts')) if Path('parts').exists() else 0} steps logged"
        )
    start("train.py", *args, "--out_dir=parts", "--resume", processes=processes).communicate()
    a, b = weights("whole/last.pt"), weights("parts/last.pt")
    equal = all((v == b[k]).all() for k, v in a.items())
    print(f"weights bit-equal: {equal}; losses equal: {losses('whole') == losses('parts')}")
    raise SystemExit(0 if equal and losses("whole") == losses("parts") else 1)


if __name__ == "__main__":
    if "--child" in sys.argv:
        number, args = int(sys.argv[2]), json.loads(sys.argv[3])
        child = start("train.py", *args, "--out_dir=parts", "--resume", processes=number)
        child.communicate()
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
