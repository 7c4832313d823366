"""Retired identifiers, private words and British spellings stay retired: one word for one thing, the field's."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = [
    path
    for package in ("vavae", "ray_jobs", "tests")
    for path in sorted((ROOT / package).rglob("*.py"))
    if path != Path(__file__)
]
DOCUMENTS = [
    path
    for pattern in ("README.md", "vavae/**/*.md", "configs/**/*.md", "configs/**/*.yaml", "cluster/**/*", "tests/*.md")
    for path in sorted(ROOT.glob(pattern))
    if path.suffix in {".md", ".yaml", ".yml", ".sh"}
]

RETIRED = """
    micro-batches: ImageSlice LatentSlice SliceKey SliceSource slice_size load_slices slices_ahead Round rounds_of
    callbacks: Observer observer observers observe keep_preview diffusion_observer tokenizer_observer
        _tokenizer_observers tokenizer_observers
    states: StepMemory recall_state
    progress: Board _board _BoardActor News lament Watch _watch watched told _Speech hear heard hearers _hearers
    shared tasks: Workshop _workshop _WorkshopActor
    shards of tensors: Fragment fragment fragments_of load_fragments save_fragments dealt entire undivided whole_moments
        _divided_moments _update_whole _moment_of_stage_3
    setup of torch: settle settle_arithmetic torchvision_remedy this_device
    checkpoints and logs: seal better_mark
    artifacts: lend lend_files _borrow Artefact artefact _artefact Wanted
    evaluation: CheckpointMeasures Measuring _Measuring MeasureConfig measure_checkpoint measure_waiting drop_measured
        checkpoint_measures checkpoint_measuring measure_generation measure_latent_space measure_tokenizer measuring
        _make_measure _missing_measures show_measured _measured figure_text
    registry of metrics: COLUMNS BESIDE Meter
    jobs and phases: STAGES StagePlan StageStatus TokenizerStage TokenizerStageConfig tokenizer_stages plan_stages
        _stages_rise _stages_can_learn
    training: _Loop _Way go_on
    planning: Offer _offer offer Safety safety_of StageEstimate
    benchmarks: Contest contest contests compete Rival rivals image_contests latent_contests stall_contest
        start_contests store_contests _start_ours _open_ours LeftOut apart _Bodies
    resources: Share NOTHING _room
    models: open_generator
    spelling: SynchronisedBatchNorm2d synchronised Judgement judgement_metrics LabelledImages labelled_images
        SignalledSession initialise initialised _initialise _normalisation _optimised Utilisation utilisation
"""
"""Names that code no longer has, by what they were for; each has a successor of the field's vocabulary."""
IDENTIFIERS = set(re.sub(r"(?m)^ +[a-z -]+:", "", RETIRED).split())

WORDS = re.compile(
    r"\b(workshops?|hearers?|laments?|lamented|dealt|observers?|rivals?|contests?|undivided|settle[sd]?|lends?|lent"
    r"|(?:goes|go|went) on (?:with|from)|to the last bit|slices? of (?:a|one|each|its) step)\b",
    re.IGNORECASE,
)
BRITISH = re.compile(
    r"\b\w*(?:artefact|normalis|optimis(?!m)|initialis|colour|behaviour|neighbour|licence|synchronis|utilis|centre"
    r"|labelled|signalled|favour|randomis|minimis|tokenis|judgement|grey)\w*",
    re.IGNORECASE,
)
KEPT = {
    "artefact": "artefact.json, the file of a commit record",
    "model_flop_utilisation": "key of the log, and name in Prometheus",
    "utilisation": "a former option that README's changes name",
    "neighbour": "protocol of precision and recall in metrics.json",
    "labelled": "protocol of samples with random labels in metrics.json",
    "unlabelled": "a data set of torchvision's in a test",
    "tokeniser": "a user's slip in a test",
    "colour": "a user's slip in a test",
}
"""Words that stay, each with its reason: they are stored, or quote others."""


def lines_with(pattern: re.Pattern[str]) -> list[str]:
    """Places and words in code and documents, except for words that stay."""
    return [
        f"{path.relative_to(ROOT)}:{number}: {match[0]}"
        for path in (*CODE, *DOCUMENTS)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        for match in pattern.finditer(line)
        if match[0].lower() not in KEPT
    ]


def test_retired_identifiers_are_gone():
    found = []
    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = {getattr(node, field, None) for field in ("name", "id", "attr", "arg", "asname")}
            found += [f"{path.relative_to(ROOT)}: {name}" for name in names & IDENTIFIERS]
    assert not found


@pytest.mark.parametrize("pattern", [WORDS, BRITISH], ids=["private words", "British spelling"])
def test_the_words_are_the_field_s(pattern):
    assert not lines_with(pattern)
