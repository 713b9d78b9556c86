"""What a step and an edit would cost on other hardware, from what was counted and measured here.

    python benchmarks/projection.py        # the tables of docs/scaling.md

Operations of every stage are worked out from a model's shapes; on the machine that `make bench` ran
on they are set against the seconds that it measured, which is how far to trust them.  What they
would take elsewhere rests on SHARE, which no GPU has confirmed.

Per fact: T tokens of a question, A answer tokens.  Per edited layer: K and V, its widths; R, the
network's rank.  P, parameters of the model; H, those of its blocks from the first edited one on; W,
those of the output layer.
"""

from __future__ import annotations

from dataclasses import dataclass

T, A = 14, 2
SITES, R = 6, 1920
SHARE = 0.4  # of a device's peak that a stage is taken to reach


@dataclass(frozen=True)
class Model:
    """A decoder's shapes; every block takes 4 H^2 for attention and ``matrices`` V K."""

    name: str
    blocks: int
    hidden: int
    width: int
    words: int
    matrices: int

    @property
    def block(self) -> float:
        return 4 * self.hidden**2 + self.matrices * self.hidden * self.width

    @property
    def output(self) -> float:
        return self.words * self.hidden


@dataclass(frozen=True)
class Device:
    """Peak operations per second: of the model's passes, of the network, of the least squares."""

    name: str
    passes: float
    network: float
    wide: float


SMOLLM2 = Model("SmolLM2-135M", 30, 576, 1536, 49152, 3)
SIX = Model("6 B (28 blocks, 4,096 and 16,384)", 28, 4096, 16384, 50400, 2)
SEVENTY = Model("70 B (80 blocks, 8,192 and 28,672)", 80, 8192, 28672, 128256, 3)
H100 = Device("H100", 989e12, 67e12, 67e12)  # bfloat16, float32 without TF32, float64: as sold


def capture(one: Model) -> float:
    """Forward through everything, backward through what lies above the first edited layer."""
    return 2 * T * one.blocks * one.block + 2 * T * SITES * one.block + 4 * A * one.output


def trunk(one: Model) -> float:
    """Of the two questions that judge a fact, what lies below: once, in the first epoch."""
    return 2 * 2 * T * (one.blocks - SITES) * one.block


def head(one: Model) -> float:
    """Both questions forward and backward, and the unedited model's logits of one."""
    layer = one.hidden * one.width
    return 2 * T * SITES * (4 * one.block + 2 * layer) + (4 + 6) * A * one.output


def network(one: Model, learning: bool) -> float:
    """Two blocks of two factors; learning runs them forward twice and backward once."""
    return A * SITES * 8 * (one.hidden + one.width) * R * (4 if learning else 1)


def least_squares(one: Model, facts: int) -> float:
    """The lower half of U U^T and D U^T, and a factor per layer; the backward solve likewise."""
    tokens, key, value = facts * A, one.width, one.hidden
    return SITES * (tokens * (1.25 * key**2 + 6 * key * value) + key**3 / 3 + 4 * key**2 * value)


def seconds(one: Model, facts: int, device: Device, count: int, learning: bool) -> dict[str, float]:
    """Of every stage; a system is factorised by every process, its sums are spread."""
    each, factor = SHARE * count, SITES * one.width**3 / 3
    wide = (least_squares(one, facts) - factor) / each + factor / SHARE
    found = {"capture": facts * capture(one) / each / device.passes}
    found["network"] = facts * network(one, learning) / each / device.network
    found["least squares"] = wide / device.wide
    if learning:
        found["trunk"] = facts * trunk(one) / each / device.passes
        found["head"] = facts * head(one) / each / device.passes
    return found


def sums(one: Model) -> float:
    """Bytes that are summed over processes: U U^T and D U^T in float64, G in float32."""
    key, value = one.width, one.hidden
    return SITES * (8 * key**2 + 8 * key * value + 4 * key * value)


def main() -> None:
    """Prints the tables."""
    print(
        f"{SMOLLM2.name}, 256 facts: capture {256 * capture(SMOLLM2) / 1e9:,.0f} GFLOP, head ",
        end="",
    )
    print(f"{256 * head(SMOLLM2) / 1e9:,.0f}, network {256 * network(SMOLLM2, True) / 1e9:,.0f}\n")
    print("| model | facts | GPUs | step, first epoch | later | edit | summed a step |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for one in (SIX, SEVENTY):
        for facts in (1024, 16384, 1_000_000):
            for count in (1, 8, 64):
                first = seconds(one, facts, H100, count, True)
                later = {n: s for n, s in first.items() if n not in ("capture", "trunk")}
                edit = seconds(one, facts, H100, count, False)
                times = [f"{sum(part.values()):,.1f} s" for part in (first, later, edit)]
                print(f"| {one.name} | {facts:,} | {count} | {' | '.join(times)} | ", end="")
                print(f"{sums(one) / 1e9:.1f} GB |" if count > 1 else "none |")
    for one in (SIX, SEVENTY):
        kept = 1_000_000 * A * SITES * 4 * (one.width + one.hidden)
        print(f"\n{one.name}: captured tensors of a million facts {kept / 1e12:.2f} TB")


if __name__ == "__main__":
    main()
