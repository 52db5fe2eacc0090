"""Small faults in the program, planted one at a time, to see whether its tests notice.

    python3 benchmarks/planted_faults.py [--commit REV] [--only 3,17] [--seconds 300]

Each fault changes what the program computes but no shape and no type: a sign, a factor, an index, a
bound, a missing copy. It is planted in a temporary copy of a commit, by default HEAD; the tests of
its module run there until one fails, and the copy is restored. The table says of each fault:

    caught       a test failed, which is named, or the tests took longer than `--seconds`
    survived     all tests passed: one is missing
    not planted  the fragment is not in the program exactly once: the fault has to be renewed
    not tested   there are no such tests, or pytest could not run them

Before that the tests run without a fault, and have to pass. The exit status is 0 only where every
fault is caught.
"""

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
OUTSIDE = ("tests", "benchmarks")

# The mistake, and the test files (with options of pytest) that should notice it; a fragment of the
# program, and what stands in its place. In a fragment ... is any text within a line, which ... in
# the other stands for again. Where lines are broken and indented does not count.
FAULTS = r"""
the slope of the ODE lacks alpha: test_seams -k rectified
- alpha_rate / alpha, alpha * with_rate(
+ alpha_rate / alpha, with_rate(

a velocity's slope takes alpha' with the wrong sign: test_seams -k rectified
- (skip - alpha * of_state)
+ (skip + alpha * of_state)

training draws a Gaussian in place of a Student t: test_pfgmpp
- scaled(std * ..., normal)
+ scaled(std, normal)

the density of a Student t falls with the power N + D - 1: test_pfgmpp
- 0.5 * (dim + D) * (squared
+ 0.5 * (dim + D - 1) * (squared

the prior's constant lacks a term of Stirling's series: test_pfgmpp
- - m + ...(a + m) - ...(a)
+ - m + ...(a + m)

PFGM: norms of the prior are cut at twice their bound: test_methods
- .clamp(1, self.upper_norm)
+ .clamp(1, 2 * self.upper_norm)

PFGM: below z_exp the field has no gamma: test_methods
- (rho + self.gamma)
+ rho

EDM: P_std is squared in the law of the noise levels: test_pfgmpp
- self.P_std * torch.randn(n,
+ self.P_std**2 * torch.randn(n,

EDM: the weight of the loss has a sum in place of a product: test_pfgmpp
- (sigma * sd) ** 2
+ (sigma + sd) ** 2

posterior means as targets are of all classes: test_labels -k of_a_class
- self.D, among)
+ self.D)

weights of a posterior mean have the power N + D - 1: test_pfgmpp
- -0.5 * (dim + D))
+ -0.5 * (dim + D - 1))

guidance leaves out the upper end of its interval: test_labels -k interval
- not low < torch.as_tensor(...).max().item() <= high
+ not low < torch.as_tensor(...).max().item() < high

DPS divides by the number of measured entries, not by its root: test_restoration -k dps
- .to(residual).sqrt()
+ .to(residual)

restoration by a Student t: D is missing in its precision: test_restoration -k student
- n + degrees - spread(
+ n - spread(

Heun's last step is not Euler's: test_solvers
- h * d if i == last
+ h * d if i > last

churn is shared among one step too many: test_solvers
- self.S_churn / (len(levels) - 1)
+ self.S_churn / len(levels)

UniPC remembers one denoised image too many: test_solvers
- del start, d, images[order - 1 :], passed[order - 1 :]
+ del start, d, images[order:], passed[order:]

the schedule has rho = 7 whatever is set: test_sampling -k 'levels or schedule'
- ** (1 / rho)).tolist()
+ ** (1 / (rho := 7.0))).tolist()

rk45 has the relative tolerance as the absolute one too: test_sampling -k 'rk45 or tolerances'
- {"rtol": rtol, "atol": atol,
+ {"rtol": rtol, "atol": rtol,

predictor and corrector always leave out the last noise: test_sampling -k 'pc_ or noise_removal'
- mean if noise_removal else x
+ mean

a guide is not told the class: test_labels -k guid
- conditioned(self._prepared(guide, x.device), conditions)
+ self._prepared(guide, x.device)

likelihood: each evaluation of the divergence has another probe: test_likelihood
- for probe in probes
+ for probe in (probes if len(probes) > 1 else torch.randint_like(probes, 2) * 2 - 1)

likelihood: the volume of a grey level has the wrong sign: test_likelihood
- - self.codec.log_volume
+ + self.codec.log_volume

label dropout keeps what it should drop: test_labels -k dropout
- examples.conditions.drop(draw < share
+ examples.conditions.drop(draw > share

the gradient is clipped by its largest entry: test_training
- nn.utils.clip_grad_norm_(..., limit)
+ nn.utils.clip_grad_norm_(..., limit, math.inf)

the objective's own gradient is not clipped: test_training
- nn.utils.clip_grad_norm_(..., limit)
+ nn.utils.clip_grad_norm_(state.parameters, limit)

the stored weights of EDM2 are normalised in evaluation too: test_edm2 -k stored
- if self.training: normalise_weights(self) classes
+ normalise_weights(self); classes

queries and keys of EDM2 keep their magnitudes: test_edm2 -k "published or cosines"
- unit_magnitude(heads, 2).permute
+ heads.permute

a sum of two activations is smaller than they are: test_edm2 -k "published or magnitude"
- a.lerp(b, t) / math.hypot(1 - t, t)
+ a.lerp(b, t)

the second gate of DiT is the first: test_dit -k paper
- gate2 * self.outer
+ gate * self.outer

the log of the variance is subtracted: test_uncertainty
- u.exp() + u
+ u.exp() - u

the learning rate falls from the first step on: test_uncertainty -k learning
- decay_from / max(step, decay_from)
+ decay_from / (step + decay_from)

dropout on a CPU does not make up for what is lost: test_op_on_cpu
- mul_(2**16 / (2**16 - lost))
+ mul_(1)

the taps of a doubled pixel lie one place off: test_op_on_cpu
- 2: [[0, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0]]
+ 2: [[0, 1, 1, 0], [0, 0, 1, 1], [1, 1, 0, 0]]

the objective is told the number of the next step: test_objectives
- objective.draw(batch, state.step, generator) state.wait
+ objective.draw(batch, state.step + 1, generator); state.wait

micro-batches are summed and not averaged: test_training
- (1 + 0 * value.detach()) * scale / accumulate
+ (1 + 0 * value.detach()) * scale

the learning rate rises one step early: test_training
- step / warmup
+ (step + 1) / warmup

the learning rate does not fall at the end: test_training
- cooldown=optim.cooldown
+ cooldown=0

a resumed run begins with its first batch: test_objectives test_ema
- state.step, shard if on_disk
+ 0, shard if on_disk

every step has the same noise: test_objectives test_ema
- "training", ...seed, state.step)
+ "training", ...seed)

each image of a reference batch has its own transformation: test_objectives test_augmentation
- data.uniform_dequantization, augment, shared)
+ data.uniform_dequantization, augment, False)

the EMA's half-life counts the images of the reference batch: test_training
- 0.5 ** (... / half_life)
+ 0.5 ** (training.batch_size / half_life)

the EMA's ramp starts anew in a resumed run: test_training
- state["ema"]["num_updates"]
+ 0

the EMA weights are the weights themselves: test_training
- p.detach().clone() if is_here(p)
+ p.detach() if is_here(p)

power-function averages do not count skipped steps: test_training
- torch.ones_like(finite, dtype=torch.float32)
+ finite.float()

training images are never dequantised: test_datasets test_augmentation
- data.uniform_dequantization,
+ False,

images that are not centred have the bounds of centred ones: test_datasets
- (-1.0, 1.0) if self.centered else (0.0, 1.0)
+ (-1.0, 1.0)

pictures are rounded down: test_datasets
- (image.clamp(0, 1) * 255).round()
+ (image.clamp(0, 1) * 255)

the consistency loss is weighted by 1 / t: test_consistency -k published
- squared / (root + self.c) / (t - r)
+ squared / (root + self.c) / t

the second pass of the consistency loss has another dropout mask: test_consistency -k dropout
- with _repeated_dropout(x.device):
+ with contextlib.nullcontext():

consistency: at the noise level 0 the endpoint is the network's: test_consistency -k zero
- torch.where(spread(r, x) == 0, clean, endpoint)
+ torch.where(spread(r, x) < 0, clean, endpoint)

the noise of a consistency sampler is Gaussian for every D: test_consistency_sampler -k kernel
- y = y + scaled(level * width, normal)
+ y = y + scaled(level, normal)

channels of arrays get the deviation 1: test_units
- (data.double() - mean) * (REFERENCE_STD / std)
+ (data.double() - mean) * (2 * REFERENCE_STD / std)

nats of arrays have the volume of the inverse map: test_gaussian_arrays
- math.log(REFERENCE_STD / std) for std in
+ math.log(std / REFERENCE_STD) for std in

joined sums of squares lack a factor: test_units
- change**2 * n * m / (n + m)
+ change**2 * n / (n + m)

P_mean falls where noise levels rise with the data: test_scales
- value + math.log(scale)
+ value - math.log(scale)

tiles are averaged by their number: test_patches
- weights[part] += weight
+ weights[part] += 1
"""


class Fault(NamedTuple):
    """The parts of an entry of `FAULTS`."""

    words: str
    tests: str
    fragment: str
    replacement: str


def parsed(text: str) -> list[Fault]:
    """The faults of a text like `FAULTS`."""
    faults = []
    for block in text.strip().split("\n\n"):
        title, fragment, replacement = block.split("\n")
        words, _, tests = title.rpartition(": ")
        faults.append(Fault(words, tests, fragment[2:], replacement[2:]))
    return faults


def plant(fault: Fault, tree: Path) -> tuple[Path, str] | None:
    """The file below `tree` that has the fragment, and its text with the fault.

    None where the fragment is not there exactly once.
    """
    pattern = re.escape(fault.fragment).replace(r"\.\.\.", "(.*?)").replace(r"\ ", r"\s+")
    matches = []
    for path in tree.glob("**/*.py"):
        if path.relative_to(tree).parts[0] not in OUTSIDE:
            text = path.read_text()
            matches += [(path, text, match) for match in re.finditer(pattern, text)]
    if len(matches) != 1:
        return None
    path, text, match = matches[0]
    replacement = fault.replacement
    for group in match.groups():
        replacement = replacement.replace("...", group, 1)
    return path, text[: match.start()] + replacement + text[match.end() :]


def run_tests(tests: str, tree: Path, seconds: float) -> tuple[str, str]:
    """The outcome of `tests` in `tree`, "caught", "survived" or "not tested", and a reason."""
    words = shlex.split(tests)
    arguments = [f"tests/{word}.py" if word.startswith("test_") else word for word in words]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *arguments]
    # no compiled files: a changed file of the same second and size would not count as changed
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    shutil.rmtree(tree / ".hypothesis", ignore_errors=True)  # examples found with other faults
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [*command, "--hypothesis-seed=0"],
            cwd=tree,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return "caught", f"not done after {seconds:g} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        lines = output.read().splitlines()
    failed = [line.split(" - ")[0] for line in lines if line.startswith(("FAILED", "ERROR"))]
    reason = " ".join(failed[:1] or lines[-1:])
    return {0: ("survived", ""), 1: ("caught", reason)}.get(status, ("not tested", reason))


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--commit", default="HEAD", help="whose files are copied")
    parser.add_argument("--only", default="", help="numbers of faults, such as 3,17; else all")
    parser.add_argument("--seconds", type=float, default=300, help="limit of a run of tests")
    options = parser.parse_args()
    faults = dict(enumerate(parsed(FAULTS), 1))
    if options.only:
        faults = {number: faults[number] for number in map(int, options.only.split(","))}
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="planted_faults_") as folder:
        tree = Path(folder)
        files = subprocess.check_output(["git", "archive", options.commit], cwd=ROOT)
        subprocess.run(["tar", "-x"], cwd=tree, input=files, check=True)
        for tests in dict.fromkeys(fault.tests for fault in faults.values()):
            outcome, reason = run_tests(tests, tree, options.seconds)
            print(f"without a fault: {tests}  {reason}", flush=True)
            if outcome == "caught":
                sys.exit("the tests have to pass without a fault")
        for number, fault in faults.items():
            start, place, outcome, reason = time.perf_counter(), "", "not planted", ""
            if planted := plant(fault, tree):
                path, text = planted
                place, original = path.relative_to(tree), path.read_text()
                path.write_text(text)
                outcome, reason = run_tests(fault.tests, tree, options.seconds)
                path.write_text(original)
            outcomes.append(outcome)
            line = f"{number:2} {outcome:11} {time.perf_counter() - start:4.0f} s  {place}  "
            print(line + fault.words + f"\n{'':21}{reason}" * bool(reason), flush=True)
    counts = ", ".join(f"{outcomes.count(each)} {each}" for each in dict.fromkeys(outcomes))
    print(f"{len(outcomes)} faults: {counts}")
    return 0 if {*outcomes} == {"caught"} else 1


if __name__ == "__main__":
    sys.exit(main())
