"""shapes.py: what a caption states is what the scene holds, and `novel` pairs stay novel."""

import random

import numpy as np
import pytest

import shapes


def scenes(n: int, novel: bool = False):
    for i in range(n):
        rng = random.Random(i)
        yield shapes.make_scene(rng, novel), rng


@pytest.mark.parametrize("novel", [False, True])
def test_every_caption_states_every_fact_and_no_other(novel):
    for scene, rng in scenes(500, novel):
        found = shapes.captions(scene, rng)
        assert len(set(found)) == 5
        for caption in found:
            assert shapes.stated(caption) == set(shapes.facts(scene)), caption


def test_held_out_pairs_occur_in_the_novel_split_alone():
    def pairs(scene):
        return {(g.colour, g.shape) for g in scene.groups} & shapes.NOVEL

    assert all(not pairs(s) for s, _ in scenes(2000))
    assert all(pairs(s) for s, _ in scenes(500, novel=True))
    for scene, rng in scenes(300):
        assert not pairs(shapes.make_variant(scene, rng))


def test_a_variant_differs_in_few_facts():
    for scene, rng in scenes(300):
        variant = shapes.make_variant(scene, rng)
        assert set(shapes.facts(variant)) != set(shapes.facts(scene))


def test_facts_of_wrong_captions_are_wrong():
    truth = [["background: black", "circle: 1", "circle: red", "circle: small"]]
    right = shapes.score_facts(["a small red circle on a black background"], truth)
    assert right == {"precision": 1.0, "recall": 1.0, "f1": 1.0}
    wrong = shapes.score_facts(["a small blue circle on a black background"], truth)
    assert wrong["precision"] == wrong["recall"] == 0.75
    assert shapes.score_facts(["two dogs run"], truth)["f1"] == 0.0
    assert shapes.stated("a RED circle, left of one ring!") == {
        "circle: red", "circle: 1", "ring: 1", "circle left of ring",
    }  # fmt: skip
    assert shapes.stated("a cross right of a ring") == shapes.stated("a ring left of a cross")
    assert shapes.stated("\x00 ☃ " + "circle " * 1000) == set()


def test_what_clips_captions_leave_out_is_not_in_their_keys():
    """Two captions count as each other's positives exactly where they state the same."""
    chance = random.Random(0)
    for scene, rng in scenes(500):
        kinds = ("background", "size", "colour", "place")
        unsaid = {kind for kind in kinds if chance.random() < 0.5}
        spots = shapes.place(scene, rng)
        text, (here, *key) = shapes.clip_caption(scene, spots, unsaid, rng)
        assert shapes.stated(text) == {fact for fact in key if not fact.endswith(": ")}
        assert (here is None) == ("place" in unsaid or len(spots) > 1)
        assert here is None or shapes.PLACES[here][0] in text
        gone = set(shapes.facts(scene)) - set(key)
        assert ("background" in unsaid) == any(fact.startswith("background") for fact in gone)


def test_pictures_show_the_scene():
    """The object's colour is where it was placed; the relation holds between the places."""
    for i in range(40):
        scene = shapes.make_scene(random.Random(i))
        rng = random.Random(i + 1000)
        spots = shapes.place(scene, rng)
        pixels = np.asarray(shapes.render(scene, rng, spots=spots))
        assert pixels.shape == (96, 96, 3)
        groups = [g for g in scene.groups for _ in range(g.count)]
        for group, (x, y, _) in zip(groups, spots, strict=True):
            if group.shape != "ring":  # whose middle is empty
                there = pixels[int(y * 96), int(x * 96)].astype(int)
                assert np.abs(there - shapes.COLOURS[group.colour]).max() <= 20
        if scene.relation in ("left of", "above"):
            axis = 0 if scene.relation == "left of" else 1
            assert spots[0][axis] < spots[1][axis]


def test_scenes_do_not_depend_on_how_many_there_are(tmp_path):
    few = shapes.build(tmp_path / "a", {"train": 3}, seed=1)
    many = shapes.build(tmp_path / "b", {"train": 5}, seed=1)
    assert many["train"][:3] == few["train"]
    name = few["train"][2]["file_name"]
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert shapes.build(tmp_path / "c", {"train": 3}, seed=2) != few
