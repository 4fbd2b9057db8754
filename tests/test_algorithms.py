"""Every line of the paper's three algorithms is cited in the code, or named here with a reason.

A citation is `Algorithm 1, line 19` or `Algorithm 1, lines 14-15 and 33-34`; in a module whose
docstring says "The lines cited here are those of Algorithm N", `lines 37, 39` is enough. A range of
more than eight lines says where an algorithm is, not where a line is: it covers none of them.
"""

import re
from pathlib import Path

import pytest

CORE = Path(__file__).parent.parent / "effad_core"
LONGEST_RANGE = 8

LINES = {
    1: """initialise S with 768 output channels; initialise A; for each channel c; empty sequence X;
        for each training image; Y' = T(I); append the channel to X; end for; mu_c and sigma_c of X;
        end for; Adam, 1e-4, weight decay 1e-5; for 70,000 iterations; random training image;
        Y' = T(I); normalise Y'; Y^S = S(I); its first 384 channels; D^ST; d_hard, 0.999-quantile;
        L_hard; random pretraining image P; L_ST = L_hard + penalty; i_aug of 1, 2, 3;
        lambda of U(0.8, 1.2); if i_aug is 1; brightness; else if 2; contrast; else if 3;
        saturation; end if; Y^A = A(I_aug); Y' = T(I_aug); normalise Y'; Y^S = S(I_aug);
        its last 384 channels; D^AE; D^STAE; L_AE; L_STAE; L_total; update S and A;
        if the iteration is above 66,500; decay the learning rate to 1e-5; end if; end for;
        empty X_ST and X_AE; for each validation image; Y', Y^S, Y^A; normalise Y'; split Y^S;
        D^ST; D^STAE; M_ST and M_AE; resize to 256x256; append to X_ST; append to X_AE; end for;
        q_a^ST and q_b^ST; q_a^AE and q_b^AE; return""",
    2: """Y', Y^S, Y^A; normalise Y'; split Y^S; D^ST; D^STAE; M_ST and M_AE; resize;
        normalise M_ST; normalise M_AE; M = 0.5 M_ST + 0.5 M_AE; score = max M; return""",
    3: """initialise T; for each channel c; empty sequence X; for 10,000 iterations; random image;
        gray with probability 0.1; resize for Psi; Y^Psi; append the channel to X; end for;
        mu_c^Psi and sigma_c^Psi; end for; Adam; for 60,000 iterations; L_batch = 0;
        for 16 images; random image; gray with probability 0.1; resize for Psi; resize to 256x256;
        Y^Psi; normalise Y^Psi; Y' = T(I); D^dist; L_dist; add to L_batch; end for;
        divide L_batch by 16; update T; end for; return""",
}
LINES = {
    algorithm: dict(enumerate((line.strip() for line in text.split(";")), start=1))
    for algorithm, text in LINES.items()
}
ELSEWHERE = {  # (algorithm, line): why no code carries it
    (1, 46): "the end of the loop is an indentation",
    (3, 10): "the end of the loop is an indentation",
    (3, 12): "all channels at once: there is no loop",
    (3, 30): "the end of the loop is an indentation",
    (3, 15): "the loop over 16 images is a batch dimension, its mean needs no accumulator",
}

NUMBERS = r"\d+(?:-\d+)?(?:(?:, | and )\d+(?:-\d+)?(?!\d))*"
NAMED = re.compile(rf"Algorithm\s+(\d),\s+lines?\s+({NUMBERS})")
BARE = re.compile(rf"\blines?\s+({NUMBERS})")
DEFAULT = re.compile(r"The lines cited here are those of Algorithm (\d)")


def citations(text):
    """(algorithm, first, last) of everything that a module's text cites."""
    text = re.sub(r"\s*\n\s*#?\s*", " ", text)  # a citation may break over two lines
    found = [(int(algorithm), numbers) for algorithm, numbers in NAMED.findall(text)]
    if default := DEFAULT.search(text):
        found += [(int(default[1]), numbers) for numbers in BARE.findall(NAMED.sub("", text))]
    for algorithm, numbers in found:
        for part in re.split(", | and ", numbers):
            first, _, last = part.partition("-")
            yield algorithm, int(first), int(last or first)


@pytest.fixture(scope="module")
def cited():
    return [
        (path.relative_to(CORE), citation)
        for path in sorted(CORE.rglob("*.py"))
        for citation in citations(path.read_text())
    ]


def test_the_algorithms_have_the_papers_lengths():
    assert {algorithm: len(lines) for algorithm, lines in LINES.items()} == {1: 61, 2: 12, 3: 31}


def test_citations_are_found():
    text = "# Algorithm 1, lines 14-15 and\n    # 33-34; Algorithm 2, line 2\n(lines 3, 5)"
    named = [(1, 14, 15), (1, 33, 34), (2, 2, 2)]
    assert list(citations(text)) == named
    header = "The lines cited here are those of Algorithm 3.\n"
    assert list(citations(header + text)) == [*named, (3, 3, 3), (3, 5, 5)]


def test_no_citation_of_a_line_that_does_not_exist(cited):
    wrong = [
        f"{path}: Algorithm {algorithm}, lines {first}-{last}"
        for path, (algorithm, first, last) in cited
        if algorithm not in LINES or not 1 <= first <= last <= len(LINES[algorithm])
    ]
    assert not wrong, wrong


@pytest.mark.parametrize("algorithm", LINES)
def test_every_line_is_cited_or_done_elsewhere(cited, algorithm):
    covered = {
        line
        for _, (which, first, last) in cited
        if which == algorithm and last - first < LONGEST_RANGE
        for line in range(first, last + 1)
    }
    elsewhere = {line for which, line in ELSEWHERE if which == algorithm}
    missing = {n: text for n, text in LINES[algorithm].items() if n not in covered | elsewhere}
    assert not missing, f"cite these lines of Algorithm {algorithm} in effad_core: {missing}"
    twice = sorted(covered & elsewhere)
    assert not twice, f"cited after all: take them out of ELSEWHERE: {twice}"
