"""The plan as a picture and as a flowchart: everything is in it, nothing overlaps, nothing can break out of it."""

import re
import time
from xml.etree import ElementTree

import pytest

from hortator.topology.mermaid import MAX_BLOCKS_SHOWN, mermaid
from hortator.topology.palette import colours
from hortator.topology.picture import MAX_HOSTS_LARGE, svg
from hortator.topology.plan import Plan
from tests.topology.test_memory import GIB, llama_8b
from tests.topology.test_plan import model, planned

SVG = "{http://www.w3.org/2000/svg}"
Box = tuple[float, float, float, float]


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Two models on three hosts: stages that cross hosts and stages that do not, replicas, a free GPU."""
    return planned(
        "node-a 8, node-b 4, 10.0.0.3 3",
        model("large", 4, 3),
        model("small", replicas=2),
        shapes={"large": llama_8b()},
        gpu_memory_bytes=80 * GIB,
    )


def drawn(plan: Plan) -> ElementTree.Element:
    return ElementTree.fromstring(svg(plan))


def titles(root: ElementTree.Element) -> dict[str, Box]:
    """Boxes by the first line of what the pointer shows."""
    found = {}
    for rect in root.iter(f"{SVG}rect"):
        title = rect.find(f"{SVG}title")
        if title is not None and title.text:
            x, y, width, height = (float(rect.get(name, "nan")) for name in ("x", "y", "width", "height"))
            found[title.text] = (x, y, x + width, y + height)
    return found


def overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def test_every_rank_and_every_free_gpu_has_a_cell_of_its_own(plan: Plan) -> None:
    cells = {title: box for title, box in titles(drawn(plan)).items() if "GPU" in title}
    assert {title for title in cells if "free" in title} == {"10.0.0.3, GPU 2: free"}
    places = {(rank.host, rank.slot) for group in plan.groups for rank in group.ranks}
    assert {tuple(title.split("\n")[1].split(", GPU ")) for title in cells if "\n" in title} == {
        (host, str(slot)) for host, slot in places
    }
    boxes = list(cells.values())
    assert not any(overlap(one, other) for n, one in enumerate(boxes) for other in boxes[:n])


def test_the_ranks_of_a_stage_are_in_one_frame_that_says_which(plan: Plan) -> None:
    boxes = titles(drawn(plan))
    x1, y1, x2, y2 = boxes["large-0, stage 1, layers 14 to 27"]
    inside = [title.split("\n")[0] for title, (a, b, c, d) in boxes.items() if x1 < a and y1 < b and c < x2 and d < y2]
    assert inside == [f"large-0, rank {rank} (tp {rank - 4}, pp 1)" for rank in range(4, 8)]


def test_there_is_an_arrow_for_each_border_between_stages(plan: Plan) -> None:
    assert len(list(drawn(plan).iter(f"{SVG}path"))) == 2


def test_nothing_is_drawn_outside_the_picture(plan: Plan) -> None:
    root = drawn(plan)
    width, height = (float(value) for value in root.get("viewBox", "").split()[2:])
    for x1, y1, x2, y2 in titles(root).values():
        assert 0 <= x1 < x2 <= width
        assert 0 <= y1 < y2 <= height


def test_the_picture_says_what_the_plan_says(plan: Plan) -> None:
    words = [text.text or "" for text in drawn(plan).iter(f"{SVG}text")]
    assert "3 groups on 14 of 15 GPUs, 3 hosts, 1 free" in words
    assert any("8.0 KiB a token between stages, across hosts" in word for word in words)
    assert "Note: small: its sizes are not known here: memory and traffic were not checked" in words


def test_many_hosts_are_drawn_small_and_soon() -> None:
    count = 1000
    hosts = ", ".join(f"h{n} 8" for n in range(count))
    assert count > MAX_HOSTS_LARGE
    plan = planned(hosts, model("m", 8, 2, count // 2))
    began = time.process_time()
    root = drawn(plan)
    assert time.process_time() - began < 10
    assert len([title for title in titles(root) if "rank" in title]) == 8 * count
    assert len(list(root.iter(f"{SVG}text"))) < 2 * count


def test_text_from_files_cannot_become_markup(plan: Plan) -> None:
    evil = plan.model_copy(update={"notes": ("</text><script>alert(1)</script>", '"><b>')})
    root = drawn(evil)
    assert not list(root.iter(f"{SVG}script"))
    assert any("<script>" in (text.text or "") for text in root.iter(f"{SVG}text"))


def test_models_have_colours_that_can_be_told_apart_and_groups_shades_of_them(plan: Plan) -> None:
    found = colours(plan)
    assert found["large-0"].line != found["small-0"].line == found["small-1"].line
    assert len({colour.fill for colour in found.values()}) == 3


def test_the_flowchart_has_each_stage_in_its_host_and_thick_arrows_between_hosts(plan: Plan) -> None:
    lines = mermaid(plan).splitlines()
    assert lines[0] == "flowchart LR"
    assert lines[1:5] == [
        '  subgraph h0["node-a: 8 x 80.0 GiB"]',
        '    g0s0r0["<b>large-0</b> stage 0<br>ranks 0-3<br>GPU 0,1,2,3<br>layers 0-13<br>72.0 GiB each"]:::g0',
        '    g0s1r4["<b>large-0</b> stage 1<br>ranks 4-7<br>GPU 4,5,6,7<br>layers 14-27<br>71.0 GiB each"]:::g0',
        "  end",
    ]
    assert '  g0s0r0 -->|"8.0 KiB a token"| g0s1r4' in lines
    assert '  g0s1r4 ==>|"8.0 KiB a token"| g0s2r8' in lines
    assert '    h2free["1 free"]:::free' in lines
    defined = set(re.findall(r"classDef (\w+)", "\n".join(lines)))
    assert set(re.findall(r":::(\w+)", "\n".join(lines))) <= defined


def test_a_flowchart_of_many_groups_is_short() -> None:
    hosts = ", ".join(f"h{n} 8" for n in range(MAX_BLOCKS_SHOWN))
    text = mermaid(planned(hosts, model("m", 4, 1, MAX_BLOCKS_SHOWN + 1), model("n")))
    assert text.splitlines() == [
        "flowchart LR",
        f'  m0["m<br>{MAX_BLOCKS_SHOWN + 1} x tp 4 x pp 1<br>on 101 hosts"]',
        '  m1["n<br>1 x tp 1 x pp 1<br>on 1 hosts"]',
        '  free["795 of 1600 slots free on 200 hosts"]',
    ]
