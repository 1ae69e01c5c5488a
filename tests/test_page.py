"""The page: what stands in it, and in a browser what can be done with it."""

import html
import json
import re
import shutil
import subprocess
import urllib.parse

import pytest
from report_samples import all_generations, answer_rows, generation, passage

from radit_jax.evaluation.page import html_page, payload
from radit_jax.evaluation.paper_tables import paper_tables
from radit_jax.evaluation.plots import plot_results
from radit_jax.evaluation.records import Picture
from radit_jax.evaluation.tables import Table

HOSTILE = "</script><script>document.title='taken'</script><!-- data --> \"'&\u2028{}"


def page_of(folder, generations, tables=None, most=1000):
    rows = answer_rows(generations)
    plot_results(rows, folder / "results.png")
    page = html_page(
        folder,
        paper_tables(rows) if tables is None else tables,
        [Picture("Answers", "results.png")],
        generations,
        most,
        seed=0,
    )
    (folder / "index.html").write_text(page, encoding="utf-8")
    return page


def embedded(page):
    (text,) = re.findall(
        r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL
    )
    return json.loads(text)


def texts(data, numbers):
    return "".join(data["strings"][number] for number in numbers)


def retrieving(system, i, **fields):
    shots = "<s>Background: Rome.\n\nQ: Capital of Italy?\nA: Rome\n\n"
    read = tuple(
        passage(
            id,
            f"Text {id}\n\nof country {i}.",
            title=f"Part {id}",
            prompt=f"{shots}Background: Part {id}: Cities Text {id}\n\nof country {i}."
            f"\n\nQ: {i}?\nA:",
        )
        for id in (1, 2)
    )
    given = generation(system, i, 1.0, passages=read, confidence=0.75)
    return given._replace(**fields)


def test_the_page_needs_nothing_else(tmp_path):
    page = page_of(tmp_path, all_generations())
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    assert "http" not in re.sub(r"http-equiv", "", page)
    assert "url(" not in page
    policy = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy[0].startswith("default-src 'none'; img-src data:;")
    assert "<!--" not in page  # every place is filled


def test_every_prompt_comes_out_as_it_went_in():
    given = [retrieving(s, i) for s in ("a", "b") for i in range(3)]
    given += [generation("c", i, 1.0, prompt=f"<s>Q: {i}?\n\n\nA:") for i in range(3)]
    data = json.loads(json.dumps(payload(given, 100, 0)))
    by_key = {(g.system, g.question_id): g for g in given}
    for _, id, _, question, answers, _, all_said in data["questions"]:
        assert len(all_said) == 3
        for system, prediction, metrics, confidence, prompt, _, read in all_said:
            g = by_key[data["systems"][system], id]
            assert data["strings"][question] == g.question
            assert [data["strings"][a] for a in answers] == list(g.answers)
            assert data["strings"][prediction] == g.prediction
            assert metrics == [1.0, 1.0]
            assert confidence == g.confidence
            assert texts(data, prompt) == g.prompt
            for p, (number, weight, answer, log_p, right, text) in zip(
                g.passages, read, strict=True
            ):
                id_of, heading, body = data["passages"][number]
                assert (id_of, weight, log_p, right) == (p.id, 0.75, -0.5, 1.0)
                assert data["strings"][heading] == f"{p.title}: Cities"
                assert data["strings"][body] == p.text
                assert data["strings"][answer] == "Paris"
                assert texts(data, text) == p.prompt


def test_what_systems_share_stands_in_the_page_once(tmp_path):
    given = [retrieving(s, i) for s in ("a", "b", "c") for i in range(5)]
    page = page_of(tmp_path, given)
    assert page.count("Capital of Italy?") == 1  # in 30 prompts
    # Of two passages; their prompts of three systems refer to them.
    assert page.count("of country 4.") == 2
    data = embedded(page)
    assert len(data["strings"]) == len(set(data["strings"]))
    assert len(data["passages"]) == 10


def test_hostile_texts_stay_texts(tmp_path):
    given = [
        g._replace(
            kind=HOSTILE,
            question=HOSTILE,
            answers=(HOSTILE,),
            prediction=HOSTILE,
            system=HOSTILE,
            dataset=HOSTILE,
            question_id=HOSTILE,
            choices=(HOSTILE,),
        )
        for g in [retrieving("a", 0)]
    ]
    table = Table(HOSTILE, HOSTILE, [[HOSTILE, HOSTILE], [HOSTILE, "1.0 [0, 2]"]])
    linked = table._replace(datasets=("", HOSTILE), systems=(HOSTILE,))
    page = page_of(tmp_path, given, [table, linked])
    data = embedded(page)
    assert HOSTILE in data["strings"]
    assert data["systems"] == [HOSTILE]
    assert page.count("<script") == 2
    assert page.count("</script>") == 2
    assert html.escape(HOSTILE) in page
    (link,) = re.findall(r'<td class="number"><a href="#([^"]*)">1.0', page)
    assert urllib.parse.parse_qs(html.unescape(link)) == {
        "dataset": [HOSTILE],
        "open": [HOSTILE],
    }


def test_a_number_leads_to_its_answers(tmp_path):
    page = page_of(tmp_path, all_generations())
    assert '<a href="#dataset=factbook&amp;open=RA-DIT">75.0 <small>[' in page, (
        "a number of Table 2"
    )
    assert "factbook EM <small>(n = 20)</small></th>" in page


def test_word_overlap_of_single_passages_is_not_judged():
    given = [retrieving("a", 0, metrics={"rouge_l": 0.5}, dataset="eli5")]
    data = payload(given, 100, 0)
    assert data["datasets"] == [
        {
            "name": "eli5",
            "shown": "ELI5",
            "metrics": ["ROUGE-L"],
            "graded": True,
            "asked": 1,
        }
    ]
    assert [read[4] for read in data["questions"][0][6][0][6]] == [None, None]
    wrong = retrieving("a", 0, passages=(passage(answer="Lyon"), passage(answer="")))
    data = payload([wrong], 100, 0)
    assert [read[4] for read in data["questions"][0][6][0][6]] == [0.0, 0.0]


def test_a_page_says_of_how_many_questions_it_shows_some(tmp_path):
    data = embedded(page_of(tmp_path, all_generations(), most=5))
    assert len(data["questions"]) == 5
    assert data["datasets"][0]["asked"] == 20


needs_chromium = pytest.mark.skipif(
    shutil.which("chromium") is None, reason="needs chromium on PATH"
)


def in_browser(page, fragment="", width=1200):
    """The page's HTML after its scripts ran."""
    done = subprocess.run(
        [
            *("chromium", "--headless", "--no-sandbox", "--disable-gpu"),
            *("--allow-file-access-from-files", "--virtual-time-budget=5000"),
            *(f"--window-size={width},900", "--dump-dom", f"{page.as_uri()}{fragment}"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout


def browsed():
    """Three datasets of twenty questions, one with options and one graded."""
    given = all_generations()
    given += [
        g._replace(
            dataset="mmlu", choices=("Paris", "Lyon"), metrics={"accuracy": v}
        )._replace(choice_scores=(v, 0.5), kind="")
        for g in given
        for v in (g.value,)
    ]
    return given + [
        retrieving("RA-DIT", i, dataset="wow", metrics={"f1": 0.4}) for i in range(70)
    ]


@pytest.fixture(scope="module")
def browsed_page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    page_of(folder, browsed())
    return folder / "index.html"


def count(dom):
    (text,) = re.findall(r'<p id="count" role="status">(.*?)</p>', dom)
    return text, dom.count("<article>")


def run_in(page, script):
    """What a script, run in the page after its own one, leaves in ``out``."""
    wrapped = f"""<script>
    const later = () => new Promise((done) => setTimeout(done, 200));
    (async () => {{
      const out = {{}};
      {script}
      const result = document.createElement("output");
      result.id = "out";
      result.textContent = JSON.stringify(out);
      document.body.append(result);
    }})();
    </script></body>"""
    copy = page.with_name("scripted.html")
    text = page.read_text(encoding="utf-8")
    copy.write_text(text.replace("</body>", wrapped), encoding="utf-8")
    (found,) = re.findall(r'<output id="out">(.*?)</output>', in_browser(copy))
    return json.loads(html.unescape(found))


FILTERS = [
    ({"dataset": "factbook"}, 20),
    ({"dataset": "factbook", "kind": "area", "right": "RA-DIT"}, 8),
    ({"dataset": "factbook", "right": "RA-DIT", "wrong": "closed book"}, 10),
    ({"right": "closed book"}, 10),
    ({"differ": "1"}, 20),
    ({"words": "country 7?"}, 11),  # 7 and 17, of wow also 27 to 67
    ({"words": "LYON capital"}, 35),
    ({"question": "mmlu/q7"}, 1),
    ({"words": "nowhere"}, 0),
    ({}, 110),
]


@pytest.mark.slow
@needs_chromium
def test_the_address_filters_questions(browsed_page):
    dom = in_browser(browsed_page, "#dataset=mmlu&right=RA-DIT")
    assert count(dom) == ("15 of 110 questions", 15)
    wanted = [urllib.parse.urlencode(state) for state, _ in FILTERS]
    found = run_in(
        browsed_page,
        f"""out.counts = [];
        for (const state of {json.dumps(wanted)}) {{
          location.hash = state;
          await later();
          out.counts.push([document.getElementById("count").textContent,
            document.querySelectorAll("article").length]);
        }}""",
    )
    # A long list grows by fifty.
    assert found["counts"] == [
        [f"{size} of 110 questions", min(size, 50)] for _, size in FILTERS
    ]


CLICKS = """
document.querySelector('td a[href*="wow"]').click();
await later();
out.after_one = document.querySelector("article").textContent;
out.bars = [...document.querySelectorAll(".weight > div")].slice(0, 2)
  .map((bar) => bar.style.width);
[...document.querySelectorAll("article summary")]
  .find((summary) => summary.textContent === "Exact prompt").click();
await later();
out.prompt = document.querySelector("article pre").textContent;
out.lengths = [document.querySelectorAll("article").length];
document.getElementById("more").click();
out.lengths.push(document.querySelectorAll("article").length);
out.no_more = document.getElementById("more").hidden;
const words = document.getElementById("words");
words.value = "country 3";
words.dispatchEvent(new Event("input", { bubbles: true }));
out.address = location.hash;
out.searched = document.querySelectorAll("article").length;
document.querySelector("button[type=reset]").click();
await later();
out.reset = document.getElementById("count").textContent;
out.unlabelled = [...document.querySelectorAll("select, input")]
  .filter((control) => !control.labels.length).length;
"""


@pytest.mark.slow
@needs_chromium
def test_two_clicks_lead_from_a_number_to_the_prompt(browsed_page):
    out = run_in(browsed_page, CLICKS)
    assert out["prompt"] == retrieving("RA-DIT", 0).passages[0].prompt
    assert "0.40RA-DITParis75 % sure" in out["after_one"]
    assert "Weight 75 %, probability of its answer 61 %" in out["after_one"]
    assert out["bars"] == ["75%", "75%"]
    assert out["lengths"] == [50, 70]
    assert out["no_more"]
    assert out["address"] == "#dataset=wow&words=country+3&open=RA-DIT"
    assert out["searched"] == 16  # 3, 13 and so on, and 30 to 39
    assert out["reset"] == "110 of 110 questions"
    assert out["unlabelled"] == 0


@pytest.mark.slow
@needs_chromium
def test_options_show_their_scores_and_which_is_right(browsed_page):
    dom = in_browser(browsed_page, "#question=mmlu/q19&open=closed+book")
    assert re.findall(
        r"<tr><th scope=\"row\">(.*?)</tr>", dom.split("<article>")[1]
    ) == [
        'Paris</th><td class="number">0</td><td>gold</td>',
        'Lyon</th><td class="number">0.5</td><td>chosen</td>',
    ]


@pytest.mark.slow
@needs_chromium
def test_a_browser_takes_hostile_texts_for_texts(tmp_path):
    # "-" and brackets would be syntax in what finds the answers in a passage.
    answers = ("a-b", "(c", "[d]", HOSTILE)
    read = (passage(text=f"Has a-b, (c and {HOSTILE}, not a-bc.", prompt=HOSTILE),)
    given = retrieving("a", 0, answers=answers, passages=read, question=HOSTILE)
    page_of(tmp_path, [given])
    dom = in_browser(tmp_path / "index.html", "#open=a")
    assert "<title>Results</title>" in dom
    assert count(dom) == ("1 of 1 questions", 1)
    assert re.findall("<mark>(.*?)</mark>", dom)[:2] == ["a-b", "(c"]
    assert len(re.findall("<mark>", dom)) == 3


@pytest.mark.slow
@needs_chromium
def test_a_phone_does_not_scroll_sideways(browsed_page):
    text = browsed_page.read_text(encoding="utf-8")
    assert (
        '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    )
    frame = browsed_page.with_name("frame.html")
    # Headless windows are at least 500 pixels wide, a frame may be smaller.
    frame.write_text(
        """<!doctype html><iframe id="f" width="390" height="800"
        src="index.html#dataset=wow&amp;open=RA-DIT"></iframe><output id="o"></output>
        <script>f.onload = () => setTimeout(() => {
          const { documentElement: root } = f.contentDocument;
          const articles = f.contentDocument.querySelectorAll("article").length;
          o.textContent = `${root.scrollWidth <= 390} ${articles}`;
        }, 300)</script>"""
    )
    assert '<output id="o">true 50</output>' in in_browser(frame)
