"""parts/shapes.py and shapes_clip.py: captions state a scene's facts; `novel` pairs stay novel."""

import random

import numpy as np
import pytest

from parts import shapes, shapes_clip


def scenes(n: int, novel: bool = False):
    for i in range(n):
        rng = random.Random(i)
        yield shapes.make_scene(rng, novel), rng


@pytest.mark.parametrize("novel", [False, True])
def test_every_caption_states_every_fact_and_no_other(novel):
    for scene, rng in scenes(500, novel):
        captions = shapes.write_captions(scene, rng)
        assert len(set(captions)) == 5
        for caption in captions:
            assert shapes.stated_facts(caption) == set(shapes.scene_facts(scene)), caption


def test_captions_mostly_begin_with_the_object_on_the_left_or_at_the_top():
    """When they began with either one as often, the demo said "left" and "right" by chance."""
    is_first = []
    for scene, rng in scenes(1000):
        if scene.relation:
            first, second = (group.shape for group in scene.groups)
            if scene.relation in ("right of", "below"):
                first, second = second, first
            caption = shapes.write_caption(scene, rng)
            is_first.append(caption.index(first) < caption.index(second))
    assert 0.7 < np.mean(is_first) < 0.9


def test_held_out_pairs_occur_only_in_the_novel_split():
    def pairs(scene):
        return {(g.colour, g.shape) for g in scene.groups} & shapes.NOVEL

    assert all(not pairs(s) for s, _ in scenes(2000))
    assert all(pairs(s) for s, _ in scenes(500, novel=True))
    for scene, rng in scenes(300):
        assert not pairs(shapes.make_variant(scene, rng))


def test_a_variant_differs_in_few_facts():
    for scene, rng in scenes(300):
        variant = shapes.make_variant(scene, rng)
        assert set(shapes.scene_facts(variant)) != set(shapes.scene_facts(scene))


def test_facts_of_wrong_captions_are_wrong():
    truth = [["background: black", "circle: 1", "circle: red", "circle: small"]]
    right = shapes.score_facts(["a small red circle on a black background"], truth)
    kinds = {kind: 1.0 for kind in ("background", "size", "colour", "shape", "count")}
    assert right == {"precision": 1.0, "recall": 1.0, "f1": 1.0, "by_kind": kinds}
    wrong = shapes.score_facts(["a small blue circle on a black background"], truth)
    assert wrong["precision"] == wrong["recall"] == 0.75
    assert wrong["by_kind"] == kinds | {"colour": 0.0}
    assert shapes.score_facts(["two dogs run"], truth)["f1"] == 0.0
    assert shapes.stated_facts("a RED circle, left of one ring!") == {
        "circle: red", "circle: 1", "ring: 1", "circle left of ring",
    }  # fmt: skip
    assert shapes.stated_facts("a cross right of a ring") == shapes.stated_facts(
        "a ring left of a cross"
    )
    assert shapes.stated_facts("\x00 ☃ " + "circle " * 1000) == set()


def test_what_clip_captions_leave_out_is_not_in_their_keys():
    """Two captions count as each other's positives exactly if they state the same."""
    chance = random.Random(0)
    for scene, rng in scenes(500):
        unsaid = {name for name in ("background", "size", "colour") if chance.random() < 0.5}
        spots = shapes.place_objects(scene, rng)
        text, (region, *key) = shapes_clip.clip_caption(scene, spots, unsaid, rng)
        assert shapes.stated_facts(text) == {fact for fact in key if not fact.endswith(": ")}
        assert (region is None) == (len(spots) > 1)
        assert region is None or shapes.SIDES[region] in text
        missing = set(shapes.scene_facts(scene)) - set(key)
        assert ("background" in unsaid) == any(f.startswith("background") for f in missing)


def test_pictures_show_the_scene():
    """Each object's colour is at its spot, and the relation holds between the spots."""
    for i in range(40):
        scene = shapes.make_scene(random.Random(i))
        rng = random.Random(i + 1000)
        spots = shapes.place_objects(scene, rng)
        pixels = np.asarray(shapes.render(scene, rng, spots=spots))
        assert pixels.shape == (96, 96, 3)
        for group, (x, y, _) in zip(scene.objects(), spots, strict=True):
            if group.shape != "ring":  # its middle is empty
                pixel = pixels[int(y * 96), int(x * 96)].astype(int)
                assert np.abs(pixel - shapes.COLOURS[group.colour]).max() <= 20
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
