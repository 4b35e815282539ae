"""Data sets in the forms in which they lie around, each a small one of the real form, to one manifest."""

import io
import json
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmcli import InputError
from mmcli.pipeline.data.manifest import Manifest
from mmcli.pipeline.data.sources.recognise import read_source, recognise
from mmcli.pipeline.data.sources.samples import Samples, SplitRule, to_manifest
from mmcli.pipeline.data.sources.tables import Columns
from mmcli.pipeline.extraction.images import UnreadableImage, image_size, load_image


def picture(path: Path, colour: str = "red") -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), colour).save(path)
    return path.read_bytes()


def read(source: object, columns: Columns | None = None, **options: object) -> Samples:
    return read_source(recognise(str(source)), columns or Columns(), **options)


def manifest(samples: Samples, **options: object) -> Manifest:
    return to_manifest(samples, name="mine", rule=SplitRule(), **options)[0]


def rows(listing: Manifest) -> dict[str, tuple[list[str], list[str]]]:
    """Captions and tag names by path."""
    names = listing.category_names
    return {
        row["path"]: (row["captions"], [names[label] for label in row["labels"]]) for row in listing.table.to_pylist()
    }


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", 'filename,caption,labels,split\na.jpg,"a dog, on a sofa",dog|couch,train\nb.jpg,a cat,cat,val\n'),
        ("t.tsv", "image\ttext\ttags\tset\na.jpg\ta dog, on a sofa\tdog;couch\ttraining\nb.jpg\ta cat\tcat\tdev\n"),
        (
            "t.jsonl",
            '{"file_name": "a.jpg", "caption": "a dog, on a sofa", "tags": ["dog", "couch"], "split": "train"}\n'
            '{"file_name": "b.jpg", "caption": "a cat", "tags": ["cat"], "split": "validation"}\n',
        ),
    ],
)
def test_a_table_of_any_form_is_read_the_same(tmp_path: Path, name: str, text: str) -> None:
    picture(tmp_path / "a.jpg")
    picture(tmp_path / "b.jpg")
    (tmp_path / name).write_text(text)
    samples = read(tmp_path / name)
    listing = manifest(samples)
    assert rows(listing) == {"a.jpg": (["a dog, on a sofa"], ["couch", "dog"]), "b.jpg": (["a cat"], ["cat"])}
    assert listing.splits.tolist() == ["train", "val"]
    assert any("captions from" in note for note in samples.notes)


def test_one_row_a_caption_is_one_image(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "1.jpg")
    (tmp_path / "captions.csv").write_text("image,caption,tag\n1.jpg,one,x\n1.jpg,two,y\n1.jpg,three,x\n")
    samples = read(tmp_path)
    assert (samples.paths, samples.captions, samples.tags) == (
        ("images/1.jpg",),
        [["one", "two", "three"]],
        [["x", "y"]],
    )


def test_parquet_may_hold_the_images_themselves(tmp_path: Path) -> None:
    data = picture(tmp_path / "elsewhere" / "x.png")
    table = pa.table({"image": [{"bytes": data, "path": "x.png"}], "text": ["a red one"], "label": [["red"]]})
    folder = tmp_path / "set"
    folder.mkdir()
    pq.write_table(table, folder / "train.parquet")
    samples = read(folder / "train.parquet")
    assert (folder / samples.paths[0]).read_bytes() == data
    (folder / samples.paths[0]).write_bytes(b"somebody's own")
    with pytest.raises(InputError, match="of another content"):
        read(folder / "train.parquet")
    assert (folder / samples.paths[0]).read_bytes() == b"somebody's own"


def test_all_problems_of_a_table_are_listed_at_once(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    (tmp_path / "t.csv").write_text("path,tags,split,id\na.jpg,x,trian,1\n,x,train,2\na.jpg,y,train,three\n")
    with pytest.raises(InputError) as error:
        read(tmp_path / "t.csv")
    line = str(error.value)
    assert all(part in line for part in ("3 problems", "'trian'", "row 2: no path", "'three'"))
    (tmp_path / "t.csv").write_text("path,tags\na.jpg,x\nmissing.jpg,x\n")
    with pytest.raises(InputError, match=r"missing\.jpg: no such image"):
        read(tmp_path / "t.csv")


def test_columns_are_named_where_they_are_not_guessed(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    (tmp_path / "t.csv").write_text("bild,satz,worte\na.jpg,ein Hund,hund+sofa\n")
    with pytest.raises(InputError, match="--path-column"):
        read(tmp_path / "t.csv")
    samples = read(tmp_path / "t.csv", Columns(path="bild", captions="satz", tags="worte", delimiter="+"))
    assert (samples.captions, samples.tags) == ([["ein Hund"]], [["hund", "sofa"]])


def test_folders_name_splits_and_tags(tmp_path: Path) -> None:
    for name in ("train/cat/1.jpg", "train/dog/2.png", "val/cat/3.jpg"):
        picture(tmp_path / name)
    (tmp_path / "train" / "cat" / ".hidden.jpg").write_bytes(b"")
    samples = read(tmp_path)
    assert samples.tags == [["cat"], ["dog"], ["cat"]]
    assert samples.splits == ["train", "train", "val"]


def test_texts_beside_images_are_captions_and_tags(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        picture(tmp_path / name)
    (tmp_path / "a.txt").write_text("a dog\na dog again\n")
    (tmp_path / "b.json").write_text('{"caption": "a cat", "tags": ["cat", "sofa"]}')
    samples = read(tmp_path)
    assert (samples.captions, samples.tags) == ([["a dog", "a dog again"], ["a cat"]], [[], ["cat", "sofa"]])
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(InputError, match=r"b\.jpg"):
        read(tmp_path)


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_archives_are_read_in_place(tmp_path: Path, kind: str) -> None:
    data = picture(tmp_path / "outside" / "1.jpg")
    members = {"000.jpg": data, "000.txt": b"a dog", "000.json": b'{"tags": ["dog"]}', "../out.jpg": data}
    path = tmp_path / "set" / f"coco-train-0001.{kind}"
    path.parent.mkdir()
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
    else:
        with tarfile.open(path, "w") as archive:
            for name, content in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    samples = read(path.parent)
    assert samples.paths == [f"{path.name}/000.jpg"]
    assert load_image(samples.root / samples.paths[0]).shape == (6, 8, 3)
    assert image_size(samples.root / samples.paths[0]) == (6, 8)
    with pytest.raises(UnreadableImage, match="001"):
        load_image(samples.root / path.name / "001.jpg")
    assert (samples.captions, samples.tags, samples.splits) == ([["a dog"]], [["dog"]], ["train"])


def test_instances_come_with_their_captions(tmp_path: Path) -> None:
    picture(tmp_path / "val2017" / "7.jpg")
    folder = tmp_path / "annotations"
    folder.mkdir()
    instances = {
        "images": [{"id": 7, "file_name": "7.jpg"}],
        "annotations": [{"id": 1, "image_id": 7, "category_id": 18}],
        "categories": [{"id": 18, "name": "dog"}, {"id": 3, "name": "car"}],
    }
    (folder / "instances_val2017.json").write_text(json.dumps(instances))
    captions = {"annotations": [{"id": 1, "image_id": 7, "caption": "a  dog\n"}]}
    (folder / "captions_val2017.json").write_text(json.dumps(captions))
    for source in (tmp_path, folder / "instances_val2017.json"):
        samples = read(source)
        assert (samples.paths, samples.captions, samples.splits) == (["val2017/7.jpg"], [["a dog"]], ["val"])
        assert (samples.tags, samples.category_names) == ([["dog"]], ["car", "dog"])


def test_open_images_and_its_narratives(tmp_path: Path) -> None:
    picture(tmp_path / "validation" / "abc.jpg")
    (tmp_path / "oidv7-class-descriptions.csv").write_text("LabelName,DisplayName\n/m/1,Dog\n/m/2,Cat\n")
    (tmp_path / "validation-annotations-human-imagelabels.csv").write_text(
        "ImageID,Source,LabelName,Confidence\nabc,verification,/m/1,1\nabc,verification,/m/2,0\n"
    )
    (tmp_path / "narratives.jsonl").write_text('{"image_id": "abc", "caption": "In this image there is a dog."}\n')
    samples = read(tmp_path)
    assert (samples.tags, samples.splits) == ([["Dog"]], ["val"])
    assert samples.captions == [["In this image there is a dog."]]


def test_visual_genome_objects_and_regions(tmp_path: Path) -> None:
    picture(tmp_path / "VG_100K" / "5.jpg")
    (tmp_path / "objects.json").write_text(
        '[{"image_id": 5, "objects": [{"names": ["Tree"]}, {"names": ["tree ", "sky"]}]}]'
    )
    (tmp_path / "region_descriptions.json").write_text('[{"id": 5, "regions": [{"phrase": "a tall tree"}]}]')
    samples = read(tmp_path)
    assert (samples.tags, samples.captions, samples.image_ids) == ([["sky", "tree"]], [["a tall tree"]], [5])


def test_a_saved_data_set_of_the_library(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = picture(tmp_path / "x.png")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
        }
    )
    part = datasets.Dataset.from_dict(
        {"image": [{"bytes": data, "path": None}], "text": ["a dog"], "label": [1]}, features
    )
    datasets.DatasetDict({"train": part}).save_to_disk(str(tmp_path / "saved"))
    samples = read(tmp_path / "saved")
    assert (samples.captions, samples.tags, samples.splits) == ([["a dog"]], [["dog"]], ["train"])
    assert (tmp_path / samples.paths[0]).read_bytes() == data


def test_splits_of_a_file_count_first(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        picture(tmp_path / name)
    (tmp_path / "t.csv").write_text("path,tags,split\na.jpg,x,train\nb.jpg,x,train\n")
    splits = tmp_path / "more" / "splits.csv"
    splits.parent.mkdir()
    splits.write_text("path,split\na.jpg,test\nb.jpg,val\n")
    assert read(tmp_path / "t.csv", split_file=splits).splits == ["test", "val"]
    splits.write_text("path,split\na.jpg,test\n")
    with pytest.raises(InputError, match=r"b\.jpg: no split"):
        read(tmp_path / "t.csv", split_file=splits)


@given(st.lists(st.text(min_size=1), unique=True, min_size=2, max_size=60), st.integers(0, 5))
def test_an_image_keeps_its_split_when_others_leave(paths: list[str], seed: int) -> None:
    rule = SplitRule(seed=seed)
    splits = dict(zip(paths, rule.draw(paths, [[]] * len(paths)), strict=True))
    half = paths[::2]
    assert dict(zip(half, rule.draw(half, [[]] * len(half)), strict=True)) == {path: splits[path] for path in half}


def test_stratified_splits_keep_the_shares_of_a_rare_tag() -> None:
    paths = [f"{number}.jpg" for number in range(1000)]
    tags = [["rare"] if number % 10 == 0 else ["common"] for number in range(1000)]
    splits = SplitRule(val=0.2, test=0.2, stratify=True).draw(paths, tags)
    rare = [split for split, row in zip(splits, tags, strict=True) if row == ["rare"]]
    assert [rare.count(name) for name in ("train", "val", "test")] == [60, 20, 20]


def test_tags_of_few_images_are_left_out_and_said(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        picture(tmp_path / name)
    (tmp_path / "t.csv").write_text("path,tags,caption\na.jpg,x|y,one\nb.jpg,x,two\n")
    listing, notes = to_manifest(read(tmp_path / "t.csv"), name="mine", rule=SplitRule(), least_images=2)
    assert listing.category_names == ("x",)
    assert "1 tags of fewer than 2 images were left out" in notes


def test_columns_of_what_has_none_are_refused(tmp_path: Path) -> None:
    picture(tmp_path / "cat" / "a.jpg")
    with pytest.raises(InputError, match=r"columns are for tables.*--tag-column"):
        read(tmp_path, Columns(tags="things"))


@pytest.mark.parametrize("name", ["http://x/y.csv", "no/such/folder/at/all", "notes.docx"])
def test_what_is_no_data_set_is_refused_in_one_line(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.docx").write_bytes(b"x")
    with pytest.raises(InputError):
        recognise(name)


def test_an_own_table_goes_all_the_way_to_tags(miniature, mmcli, tmp_path: Path) -> None:
    """A CSV, pictures in a zip file without captions, and a head that reads images alone."""
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for number in range(60):
            colour = ("red", "green", "blue")[number % 3]
            split = "val" if number % 5 == 3 else "test" if number % 5 == 4 else "train"
            stream = io.BytesIO()
            Image.new("RGB", (40 + number % 7, 30), colour).save(stream, "PNG")
            archive.writestr(f"{split}/{colour}/{number}.png", stream.getvalue())
    code, out, err = mmcli("prepare", "photos.zip")
    assert code == 0, err
    assert "60 of 60 images have no caption" in " ".join(out.split())
    assert mmcli("extract", "--data", ".", "--model", miniature.model, "--patches", 64, "--device", "cpu")[0] == 0
    small = ("--preset", "small", "--epochs", 3, "--device", "cpu", "--set", "knn.K=5", "--bits", 16)
    code, _, err = mmcli("train-head", *small)
    assert code == 2
    assert "60 of 60 images have no caption" in err
    assert "--inputs image" in err
    assert mmcli("train-head", *small, "--inputs", "image", "--out", "run")[0] == 0
    assert mmcli("knn-eval", "--run", "run", "--k", 5)[0] == 0
    Image.new("RGB", (50, 40), "red").save(tmp_path / "new.png")
    code, out, err = mmcli("predict", "new.png", "--run", "run", "--data", ".", "--json")
    assert code == 0, err
    tags = json.loads(out)["images"][0]["tags"]
    assert {tag["tag"] for tag in tags} <= {"red", "green", "blue"}
    assert tags[0]["neighbours"][0]["path"].startswith("photos.zip/train/")
