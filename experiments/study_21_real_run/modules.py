"""Small Verilog modules with a sentence that specifies them and a test bench that a simulator runs (Icarus Verilog)."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

PASSED = "all checks of this bench passed"
MOST_VECTORS, SECONDS = 40, 10
Step = Callable[..., int | None]  # of the width, the state (where there is a clock) and the inputs by role


@dataclass(frozen=True)
class Family:
    """A kind of module. Ports are `role:bits`, inputs before `>`; `w` is the width of the one in hand."""

    name: str
    says: str
    ports: str
    body: str
    right: Step
    clocked: bool = False


def gate(name: str, symbol: str, right: Step, *, inverted: bool = False) -> Family:
    value = f"{{a}} {symbol} {{b}}"
    value = f"~({value})" if inverted else value
    return rule(f"{name}_gate", f"Bitwise {name.upper()} of {{a}} and {{b}}.", "a:w b:w > y:w", value, right)


def rule(name: str, says: str, ports: str, value: str, right: Step) -> Family:
    """A module of one assignment."""
    return Family(name, says, ports, f"assign {{y}} = {value};", right)


def state(name: str, says: str, ports: str, body: str, right: Step) -> Family:
    """A module with a clock, whose output is its state."""
    return Family(name, says, f"k:1 {ports}", f"always @(posedge {{k}}) {body}", right, clocked=True)


def held(value: int | None, new: Callable[[int], int]) -> int | None:
    return None if value is None else new(value)


LEARNED: tuple[Family, ...] = (
    gate("and", "&", lambda w, a, b: a & b),
    gate("or", "|", lambda w, a, b: a | b),
    gate("xor", "^", lambda w, a, b: a ^ b),
    gate("nand", "&", lambda w, a, b: ~(a & b), inverted=True),
    gate("nor", "|", lambda w, a, b: ~(a | b), inverted=True),
    rule("inverter", "Bitwise NOT of {a}.", "a:w > y:w", "~{a}", lambda w, a: ~a),
    rule("mux", "{y} is {b} if {s} is 1, else {a}.", "a:w b:w s:1 > y:w", "{s} ? {b} : {a}",
         lambda w, a, b, s: b if s else a),
    rule("adder", "Sum of {a} and {b}, without the carry.", "a:w b:w > y:w", "{a} + {b}", lambda w, a, b: a + b),
    rule("subtractor", "Difference {a} minus {b}.", "a:w b:w > y:w", "{a} - {b}", lambda w, a, b: a - b),
    rule("equal", "{y} is 1 if {a} equals {b}.", "a:w b:w > y:1", "{a} == {b}", lambda w, a, b: int(a == b)),
    rule("less", "{y} is 1 if {a} is less than {b}.", "a:w b:w > y:1", "{a} < {b}", lambda w, a, b: int(a < b)),
    rule("maximum", "The larger of {a} and {b}.", "a:w b:w > y:w", "({a} > {b}) ? {a} : {b}",
         lambda w, a, b: max(a, b)),
    rule("parity", "XOR of all bits of {a}.", "a:w > y:1", "^{a}", lambda w, a: a.bit_count()),
    rule("all_ones", "{y} is 1 if all bits of {a} are 1.", "a:w > y:1", "&{a}", lambda w, a: int(a == 2**w - 1)),
    rule("is_zero", "{y} is 1 if {a} is zero.", "a:w > y:1", "{a} == 0", lambda w, a: int(a == 0)),
    rule("shift_left", "{a} shifted left by one bit.", "a:w > y:w", "{a} << 1", lambda w, a: a << 1),
    rule("increment", "{a} plus one.", "a:w > y:w", "{a} + 1", lambda w, a: a + 1),
    rule("negate", "Two's complement of {a}.", "a:w > y:w", "-{a}", lambda w, a: -a),
    rule("gray", "Gray code of {a}.", "a:w > y:w", "{a} ^ ({a} >> 1)", lambda w, a: a ^ (a >> 1)),
    rule("joined", "{a} in the high bits, {b} in the low ones.", "a:w b:w > y:2w", "{{{a}, {b}}}",
         lambda w, a, b: (a << w) | b),
    rule("majority", "{y} is 1 where at least two of {a}, {b} and {c} are 1.", "a:w b:w c:w > y:w",
         "({a} & {b}) | ({a} & {c}) | ({b} & {c})", lambda w, a, b, c: (a & b) | (a & c) | (b & c)),
    rule("masked", "{a} if {s} is 1, else zero.", "a:w s:1 > y:w", "{s} ? {a} : 0", lambda w, a, s: a * s),
    state("register", "Register: {y} takes {a} on each clock.", "a:w > y:w", "{y} <= {a};",
          lambda w, was, a: a),
    state("enabled", "Register with enable {s}.", "a:w s:1 > y:w", "if ({s}) {y} <= {a};",
          lambda w, was, a, s: a if s else was),
    state("cleared", "Register with synchronous reset {s}.", "a:w s:1 > y:w", "if ({s}) {y} <= 0; else {y} <= {a};",
          lambda w, was, a, s: 0 if s else a),
    state("counter", "Counter that goes up by one, with synchronous reset {s}.", "s:1 > y:w",
          "if ({s}) {y} <= 0; else {y} <= {y} + 1;", lambda w, was, s: 0 if s else held(was, lambda now: now + 1)),
    state("accumulator", "Adds {a} on each clock, with synchronous reset {s}.", "a:w s:1 > y:w",
          "if ({s}) {y} <= 0; else {y} <= {y} + {a};",
          lambda w, was, a, s: 0 if s else held(was, lambda now: now + a)),
    state("shifter", "Shift register: {a} enters at the low end, with synchronous reset {s}.", "a:1 s:1 > y:w",
          "if ({s}) {y} <= 0; else {y} <= {{{y}, {a}}};",
          lambda w, was, a, s: 0 if s else held(was, lambda now: 2 * now + a)),
)  # fmt: skip
NEW: tuple[Family, ...] = (
    gate("xnor", "^", lambda w, a, b: ~(a ^ b), inverted=True),
    rule("differs", "{y} is 1 if {a} is not equal to {b}.", "a:w b:w > y:1", "{a} != {b}",
         lambda w, a, b: int(a != b)),
    rule("greater", "{y} is 1 if {a} is greater than {b}.", "a:w b:w > y:1", "{a} > {b}",
         lambda w, a, b: int(a > b)),
    rule("minimum", "The smaller of {a} and {b}.", "a:w b:w > y:w", "({a} < {b}) ? {a} : {b}",
         lambda w, a, b: min(a, b)),
    rule("any_one", "{y} is 1 if any bit of {a} is 1.", "a:w > y:1", "|{a}", lambda w, a: int(a > 0)),
    rule("shift_right", "{a} shifted right by one bit.", "a:w > y:w", "{a} >> 1", lambda w, a: a >> 1),
    rule("decrement", "{a} minus one.", "a:w > y:w", "{a} - 1", lambda w, a: a - 1),
    rule("product", "Product of {a} and {b}.", "a:w b:w > y:2w", "{a} * {b}", lambda w, a, b: a * b),
    rule("three_and", "Bitwise AND of {a}, {b} and {c}.", "a:w b:w c:w > y:w", "{a} & {b} & {c}",
         lambda w, a, b, c: a & b & c),
    state("down_counter", "Counter that goes down by one, with synchronous reset {s}.", "s:1 > y:w",
          "if ({s}) {y} <= 0; else {y} <= {y} - 1;", lambda w, was, s: 0 if s else held(was, lambda now: now - 1)),
    state("toggle", "{y} inverts all its bits on each clock, with synchronous reset {s}.", "s:1 > y:w",
          "if ({s}) {y} <= 0; else {y} <= ~{y};", lambda w, was, s: 0 if s else held(was, lambda now: ~now)),
    state("delayed_and", "Register that takes {a} AND {b} on each clock.", "a:w b:w > y:w", "{y} <= {a} & {b};",
          lambda w, was, a, b: a & b),
)  # fmt: skip
TRAIN_NAMES = tuple(
    dict(zip("abcsyk", names.split(), strict=True))
    for names in ("a b c s y clk", "x0 x1 x2 sel z clk", "in1 in2 in3 ctrl out clk", "p q r t res ck", "d e f g o clk")
)  # fmt: skip
TEST_NAMES = tuple(
    dict(zip("abcsyk", names.split(), strict=True)) for names in ("u v w m n clock", "lhs rhs mid flag result clk")
)
TRAIN_WIDTHS, TEST_WIDTHS = (1, 2, 4, 8, 16), (3, 6)


@dataclass(frozen=True)
class Module:
    """A module of a family: what it says, its head, its right body, and how it is tested."""

    family: Family
    name: str
    names: Mapping[str, str]
    width: int

    @property
    def ports(self) -> list[tuple[str, int, bool]]:
        """Role, bits, and whether it is an output."""
        before, _, after = self.family.ports.partition(">")
        bits = {"w": self.width, "2w": 2 * self.width, "1": 1}
        listed = [(port.split(":"), out) for out, part in ((False, before), (True, after)) for port in part.split()]
        return [(role, bits[size], out) for (role, size), out in listed]

    @property
    def prompt(self) -> str:
        """It ends at the border of a token: a line break would be one token with the indentation behind it."""

        def port(role: str, bits: int, out: bool) -> str:
            kind = ("output reg" if self.family.clocked else "output") if out else "input"
            return f"{kind} [{bits - 1}:0] {self.names[role]}" if bits > 1 else f"{kind} {self.names[role]}"

        ports = ", ".join(port(*one) for one in self.ports)
        return f"// {self.family.says.format(**self.names)}\nmodule {self.name}({ports});"

    @property
    def text(self) -> str:
        return f"{self.prompt}\n  {self.family.body.format(**self.names)}\nendmodule\n"

    def bench(self, seed: int = 0) -> str:
        """A module `bench` that prints `PASSED` if the outputs are right for every input, or for many of them."""
        inputs = [(role, bits) for role, bits, out in self.ports if not out and role != "k"]
        (bits,) = (bits for _, bits, out in self.ports if out)
        checks, was = [], None
        for values in self._vectors(inputs, seed):
            given = " ".join(f"{self.names[role]} = {value};" for role, value in values.items())
            state = (was,) if self.family.clocked else ()
            found = self.family.right(self.width, *state, **values)
            was = None if found is None else found % 2**bits
            tick = f"#1 {self.names['k']} = 1; #1 {self.names['k']} = 0;" if self.family.clocked else "#1"
            wrong = f'if ({self.names["y"]} !== {bits}\'d{was}) begin $display("wrong"); $finish; end'
            checks.append(f"    {given} {tick} {';' if was is None else wrong}")
        wires = [f"  {'wire' if out else 'reg'} [{size - 1}:0] {self.names[role]};" for role, size, out in self.ports]
        ports = ", ".join(f".{self.names[role]}({self.names[role]})" for role, _, _ in self.ports)
        clock = [f"    {self.names['k']} = 0;"] if self.family.clocked else []
        lines = [f"  {self.name} unit({ports});", "  initial begin", *clock, *checks]
        return "\n".join(
            ["module bench;", *wires, *lines, f'    $display("{PASSED}"); $finish;', "  end", "endmodule\n"]
        )

    def _vectors(self, inputs: Sequence[tuple[str, int]], seed: int) -> list[dict[str, int]]:
        """All inputs where they are few and nothing is remembered; else drawn ones, of which the first sets `s`."""
        rng, roles = random.Random(f"{self.name} {seed}"), [role for role, _ in inputs]
        if not self.family.clocked and sum(bits for _, bits in inputs) <= 6:
            return [dict(zip(roles, given, strict=True)) for given in product(*(range(2**bits) for _, bits in inputs))]
        drawn = [{role: rng.randrange(2**bits) for role, bits in inputs} for _ in range(MOST_VECTORS)]
        if not self.family.clocked:  # the corners, and equal inputs
            corners = [dict.fromkeys(roles, 0), {role: 2**bits - 1 for role, bits in inputs}]
            return [*corners, {role: drawn[0][roles[0]] % 2**bits for role, bits in inputs}, *drawn]
        for at, one in enumerate(drawn):
            one.update({"s": int(at == 0 or rng.random() < 0.3)} if "s" in one else {})
        return drawn


def modules(families: Sequence[Family], names: Sequence[Mapping[str, str]], widths: Sequence[int]) -> list[Module]:
    """Of each family one with every choice of names and width."""
    return [
        Module(family, f"{family.name}_{width}" if width > 1 else family.name, chosen, width)
        for family in families
        for chosen in names
        for width in widths
    ]


def taught() -> list[Module]:
    return modules(LEARNED, TRAIN_NAMES, TRAIN_WIDTHS)


def asked() -> list[Module]:
    """Two of each family, with port names (but `clk`) and widths not taught; of `NEW` not even the families were."""
    pairs = list(zip(TEST_NAMES, TEST_WIDTHS, strict=True))
    return [one for family in (*LEARNED, *NEW) for names, width in pairs for one in modules([family], [names], [width])]


def simulate(module: Module, continuation: str) -> str:
    """`passes`, `compiles` (but gives a wrong output) or `broken`, of what a model wrote behind the prompt.

    Raises:
        ValueError: if there is no simulator.
    """
    if shutil.which("iverilog") is None:
        raise ValueError("iverilog: not found; install Icarus Verilog (Debian: apt-get install iverilog)")
    body, _, _ = continuation.partition("endmodule")
    with TemporaryDirectory() as folder:
        source, program = Path(folder) / "all.v", Path(folder) / "all"
        source.write_text(f"{module.prompt}\n{body}\nendmodule\n{module.bench()}", encoding="utf-8")
        try:
            built = _run("iverilog", "-g2012", "-s", "bench", "-o", str(program), str(source))
            if built.returncode:
                return "broken"
            return "passes" if re.search(f"^{PASSED}$", _run("vvp", "-n", str(program)).stdout, re.M) else "compiles"
        except subprocess.TimeoutExpired:
            return "compiles"


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=SECONDS, errors="replace")
