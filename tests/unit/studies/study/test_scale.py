"""The study of sizes: which runs it needs, how it continues after a stop, and its answers."""

import shutil
from dataclasses import dataclass, replace

import pytest

from offramp.cli import main
from offramp.errors import CheckpointError, ConfigError
from offramp.making import study
from offramp.reading import read_json
from offramp.report.charts import chart_of
from offramp.report.scale import markdown, page, summary_csv
from offramp.report.scale_plot import ratios
from offramp.report.scale_result import ScaleResult, Size
from offramp.report.study_json import read_scale, to_json
from offramp.report.study_result import Ratio, Spread
from offramp.studies.runs import new_run
from offramp.studies.study.candidates import Candidate
from offramp.studies.study.config import StudyConfig
from offramp.studies.study.plan import GateFit
from offramp.studies.study.run import StudyText
from offramp.studies.study.scale import SCALE, plan_sizes, run_scale
from offramp.studies.study.scale_summary import _answers, _fit
from offramp.studies.study.workers import Workers

TEXT = "The exits of a model stand after its blocks, one and two. " * 60
ABOUT = {"corpus": "text.txt", "sha256": "0", "test_sha256": "1", "split": "all"}


class Watcher:
    def __init__(self, most=100):
        self.most, self.done, self.planned = most, [], None

    def on_plan(self, name, total, tokens):
        self.planned = (name, total, tokens)

    def on_done(self, name):
        self.done.append(name)
        if len(self.done) == self.most:
            raise KeyboardInterrupt


@dataclass(frozen=True, kw_only=True)
class Here(Workers):
    """Runs in this process, which starts faster than another one."""

    def do(self, runs, watcher):
        self.folder.mkdir(parents=True, exist_ok=True)
        for run in runs:
            if not (self.folder / run.name).exists():
                with new_run(self.folder, run.name) as aside:
                    run.work(aside, on_step=lambda _: None, should_stop=lambda: False)
            watcher.on_done(run.name)


@pytest.fixture(scope="module")
def tiny():
    training = replace(SCALE.study.training, seq_len=32, batch_size=4, warmup_steps=0)
    return replace(
        SCALE,
        study=replace(
            SCALE.study,
            training=training,
            tokens=32 * 128,
            test_tokens=320,
            gates=GateFit(tokens=256, steps=3),
            seeds=1,
        ),
        recipe=Candidate(exits=(1, 2), source=1),
        widths=(32, 64),
    )


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """A whole study; a test that changes its files takes a copy."""
    folder = tmp_path_factory.mktemp("scale")
    (folder / "text.txt").write_text(TEXT)
    config = StudyConfig(corpus=str(folder / "text.txt"))
    out, watcher = folder / "out", Watcher()
    result = run_scale(tiny, config, out, watcher=watcher, workers=Here(folder=out / "runs"))
    return config, out, watcher, result


def text_of(letters):
    return StudyText(train=letters * 400, held_out=letters, test=letters, about=ABOUT)


def test_tokens_grow_as_the_blocks_do_and_the_recipe_is_that_of_recipe_exact():
    assert SCALE.widths == (64, 96, 128, 160)
    ends = replace(SCALE, widths=(64, 160))
    sizes = plan_sizes(ends, text_of("".join(map(chr, range(33, 156)))))
    for size in sizes:
        assert {run.training.seed for run in size.runs} == {0, 1, 2}
        assert len(size.runs) == 3 * (3 + 1)
        tokens = size.runs[0].tokens
        assert tokens / size.parameters == pytest.approx(3.0, abs=0.15)
        recipe = size.runs[3]
        assert recipe.conventions == ("exact",)
        assert recipe.exit_layers == (1, 2, 6)
        assert recipe.model.upper_intermediate_size > recipe.model.intermediate_size
        assert recipe.specialise.compute_budget == pytest.approx(60, abs=0.5)
    assert [size.runs[0].training.steps for size in sizes] == [225, 1407]
    assert [size.runs[3].gates.steps for size in sizes] == [2500, 15625]
    assert [size.runs[3].specialise.steps for size in sizes] == [750, 4688]
    assert sizes[-1].parameters / sizes[0].parameters > 6


def test_a_study_holds_a_ratio_of_each_size_and_a_line(tiny, whole):
    config, out, watcher, result = whole
    tokens = 4 * (2 + 8) * 128  # 4 models of 2 and of 8 steps
    assert watcher.planned == ("scale", 8, tokens)
    assert [size.width for size in result.sizes] == [32, 64]
    assert (result.missing, result.missing_kv, result.confidence) == ((), "exact", "gain")
    for size in result.sizes:
        assert size.epochs == pytest.approx(size.train_tokens / (0.9 * 0.95 * len(TEXT)), rel=0.01)
        for mine, static, ratio in zip(
            size.ppl.values, size.static_ppl.values, size.to_static.values, strict=True
        ):
            assert ratio == pytest.approx(mine / static)
        assert all((out / "runs" / name).is_dir() for name in size.runs)
    assert result.fit.models == 2
    assert result.fit.extrapolated.parameters == pytest.approx(100e6)
    assert read_scale(out / "study.json") == result
    for name in ("table.md", "report.html", "summary.csv", "figure.png", "timing.json"):
        assert (out / name).stat().st_size > 100
    again = Watcher()
    before = (out / "study.json").read_bytes()
    workers = Here(folder=out / "runs")
    assert main(["plot", str(out / "study.json"), "--out", str(out / "plot.svg")]) is None
    with pytest.raises(CheckpointError, match="sizes differ"):
        run_scale(replace(tiny, widths=(32,)), config, out, watcher=again, workers=workers)
    assert (out / "study.json").read_bytes() == before


def test_a_study_that_was_stopped_shows_the_sizes_it_has_and_goes_on(tiny, whole, tmp_path):
    config, out, _, result = whole
    runs = shutil.copytree(out / "runs", tmp_path / "runs")
    (lost,) = {result.sizes[0].runs[0]}
    shutil.rmtree(runs / lost)
    late = result.sizes[1].runs[-1]
    shutil.copytree(runs / late, tmp_path / "late")
    shutil.rmtree(runs / late)
    with pytest.raises(KeyboardInterrupt):  # after the first size and a part of the second
        run_scale(
            tiny, config, tmp_path / "out", watcher=Watcher(most=5), workers=Here(folder=runs)
        )
    part = read_scale(tmp_path / "out" / "study.json")
    assert ([size.width for size in part.sizes], part.missing) == ([32], (64,))
    assert part.sizes[0] == result.sizes[0]
    assert part.fit is None
    assert "runs of width 64 are missing" in part.answers[-1]
    run_scale(tiny, config, tmp_path / "out", watcher=Watcher(), workers=Here(folder=runs))
    for name in ("study.json", "table.md", "summary.csv", "report.html"):
        assert (tmp_path / "out" / name).read_bytes() == (out / name).read_bytes()


def sizes_of(*ratios, seeds=3):
    """Sizes of 0.3M parameters and twice as many each, with these ratios, a list a size."""
    spread = Spread(mean=4.0, std=0.1, values=(4.0,) * seeds)
    return [
        Size(
            width=32 * (place + 1),
            layers=6,
            parameters=300_000 * 2**place,
            train_tokens=900_000,
            tokens_per_parameter=3.0,
            epochs=1.0,
            ppl=spread,
            static_ppl=spread,
            standard_ppl=spread,
            to_static=Ratio(mean=each[0], values=tuple(each), interval=None, p_value=None),
            to_standard=Ratio(mean=1.0, values=(1.0,) * seeds, interval=None, p_value=None),
            runs=(),
        )
        for place, each in enumerate(ratios)
    ]


def said_of(*ratios):
    seeds = len(ratios[0])
    sizes = sizes_of(*ratios, seeds=seeds)
    result = ScaleResult(
        study="scale",
        question="?",
        text=ABOUT,
        offramp_version="1",
        test_tokens=1,
        seeds=tuple(range(seeds)),
        compared_at=60.0,
        confidence="gain",
        missing_kv="exact",
        sizes=tuple(sizes),
        missing=(),
        fit=_fit(sizes),
    )
    return result, " ".join(_answers(result))


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        (([0.99, 0.991, 0.989], [0.97, 0.971, 0.969], [0.95, 0.951, 0.949]), "it grows"),
        (([0.95, 0.951, 0.949], [0.97, 0.971, 0.969], [0.99, 0.991, 0.989]), "it shrinks"),
        (([0.99, 0.93, 0.96], [0.97, 0.93, 0.98], [0.95, 0.99, 0.97]), "undecided"),
        (([0.99, 0.991], [0.97, 0.971], [0.95, 0.951]), "undecided"),  # two seeds
        (([0.99], [0.95]), "undecided"),
    ],
)
def test_the_verdict_takes_three_seeds_and_a_slope(ratios, verdict):
    result, said = said_of(*ratios)
    assert f"Here {verdict}: with ten times the parameters" in said
    assert "Extrapolated, not measured: at 100M parameters" in said
    assert "nan" not in said
    known = "95% interval for one more seed" in said and "interval not known" not in said
    assert known == (len(ratios[0]) > 1)
    widths = [at.prediction[1] - at.prediction[0] for at in result.fit.curve if at.prediction]
    assert not widths or widths[-1] == max(widths)  # far away is the least certain


def test_the_page_and_the_picture_mark_what_is_extrapolated():
    result, _ = said_of([0.99, 0.991, 0.989], [0.97, 0.971, 0.969], [0.95, 0.951, 0.949])
    result = replace(result, answers=tuple(_answers(result)))
    spec = ratios(result).to_dict()

    def of_mark(kind):
        drawn = [each for each in spec["layer"] if each["mark"]["type"] == kind]
        return [(each["mark"], spec["datasets"][each["data"]["name"]]) for each in drawn]

    (beyond,) = [points for mark, points in of_mark("line") if "strokeDash" in mark]
    assert [beyond[at]["millions"] for at in (0, -1)] == pytest.approx([1.2, 100])
    ((_, (words,)),) = of_mark("text")
    assert words["text"].startswith("100M: 0.8")
    assert words["text"].endswith("(extrapolated)")
    ((_, points),) = of_mark("point")
    assert len(points) == 9  # one a seed
    assert page(result).count("<figure>") == 1
    text = markdown(result)
    for said in ("Extrapolated, not measured", "| extrapolation |", "| 1,200,000 |"):
        assert said in text
    assert len(summary_csv(result).splitlines()) == 1 + 9
    assert chart_of(to_json(result)).to_dict()["layer"]


def test_a_ratio_that_no_policy_reaches_is_left_out_of_the_line():
    result, said = said_of([None, None, None], [0.97, 0.971, 0.969], [0.95, 0.951, 0.949])
    assert result.fit.models == 6
    assert "an unknown amount with 0.30M" in said
    lone, said = said_of([None, None], [0.97, 0.96])
    assert lone.fit is None
    assert "takes two sizes" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["scale", "--sizes", "100"], "sizes: expected multiples of 32 up to 2048, got 100"),
        (["scale", "--sizes", "0"], "sizes: expected multiples of 32 up to 2048, got 0"),
        (["scale", "--sizes", "4096"], "sizes: expected multiples of 32 up to 2048, got 4096"),
        (["scale", "--sizes", "x"], "Invalid value"),
        (["scale", "--tokens", "9"], "tokens: expected none with study scale"),
        (["alpha", "--sizes", "64,32"], "sizes: expected none with study alpha, got 32, 64"),
    ],
)
def test_options_that_do_not_fit_are_sentences(options, message, tmp_path, capsys):
    arguments = ["study", *options, "--corpus", "pangram", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_python_takes_sizes_and_refuses_what_is_none(tmp_path):
    for sizes, message in (([100], "multiples of 32"), ("64", "sizes: expected"), ([], "none")):
        with pytest.raises(ConfigError, match=message):
            study("scale", "pangram", out=tmp_path / "out", sizes=sizes)
    assert not (tmp_path / "out").exists()
    assert StudyConfig(corpus="pangram", sizes=(96, 64, 96)).sizes == (64, 96)


def test_settings_name_the_sizes(whole):
    settings = read_json(whole[1] / "settings.json")
    assert (settings["study"], settings["sizes"], settings["seeds"]) == ("scale", [32, 64], 1)
