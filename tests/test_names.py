"""Retired identifiers, private words and British spellings stay retired: one word for one thing, the field's."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = [path for package in ("vavae", "ray_jobs", "tests") for path in sorted((ROOT / package).rglob("*.py"))]
DOCUMENTS = [
    path
    for pattern in ("README.md", "vavae/**/*.md", "configs/**/*.md", "configs/**/*.yaml", "cluster/**/*", "tests/*.md")
    for path in sorted(ROOT.glob(pattern))
    if path.suffix in {".md", ".yaml", ".yml", ".sh"}
]

IDENTIFIERS = set(
    re.findall(
        r"\w+",
        """
        ImageSlice LatentSlice SliceKey SliceSource slice_size load_slices slices Round rounds_of
        Observer observers observe keep_preview StepMemory Board News lament Watch watched Workshop hearers heard
        _Speech
        Fragment fragments fragments_of load_fragments save_fragments dealt entire undivided whole_moments
        settle settle_arithmetic seal behind lend lend_files _borrow Artefact artefact CheckpointMeasures Measuring
        measure_checkpoint measure_waiting drop_measured COLUMNS BESIDE Column Meter STAGES TokenizerStage
        TokenizerStageConfig tokenizer_stages StagePlan StageStatus open_generator Contest contests compete Rival rivals
        Share NOTHING Works WORKS _Worker _Loop _Way go_on
        """,
    )
)
"""Names that code no longer has, each with a successor of the field's vocabulary."""

WORDS = re.compile(
    r"\b(board|workshop|hearers?|laments?|lamented|dealt|goes on with|go on with|went on with|to the last bit"
    r"|rivals?|contests?)\b",
    re.IGNORECASE,
)
BRITISH = re.compile(
    r"\w*(artefact|normalis|optimis|initialis|colour|behaviour|neighbour|licence|synchronis|utilis|centre|labelled"
    r"|favour|randomis|minimis|tokenis|judgement|grey)\w*",
    re.IGNORECASE,
)
ALLOWED = {
    "board",  # board.json, the Grafana dashboard's file
    "tokeniser",  # keys with a mistake, which a test has corrected
    "Unlabelled",  # a class of a test's torchvision
    "utilisation",  # the former option, in the changes
    "artefact",  # artefact.json, the file of a commit record
    "artefact.json",
    "model_flop_utilisation",  # of the log and of Prometheus
    "ray_vavae_model_flop_utilisation",
    "neighbour",  # in the protocol of precision and recall, which metrics.json holds
    "labelled",  # in the protocol of samples with random labels
}
"""Stored names, which never change, and quotations."""
HERE = Path(__file__)


def prose_of(path):
    """Docstrings and comments of a module with their lines; every line of a document."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield from enumerate(text.splitlines(), 1)
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING):
            for offset, line in enumerate(token.string.splitlines()):
                yield token.start[0] + offset, line


def test_retired_identifiers_are_gone():
    found = []
    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = {getattr(node, field, None) for field in ("name", "id", "attr", "arg", "asname")}
            found += [f"{path.relative_to(ROOT)}: {name}" for name in names & IDENTIFIERS]
    assert not found


@pytest.mark.parametrize("pattern", [WORDS, BRITISH], ids=["private words", "British spelling"])
def test_the_words_are_the_field_s(pattern):
    found = [
        f"{path.relative_to(ROOT)}:{line}: {match[0]}"
        for path in (*CODE, *DOCUMENTS)
        if path != HERE
        for line, text in prose_of(path)
        for match in pattern.finditer(text)
        if match[0] not in ALLOWED
    ]
    assert not found
