"""Sets of tensorflow-datasets that are not known by name: miniatures that the library's own writer has written."""

import io
import json
import shutil
import sys
import types

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as library

from e2sad_jax import data
from e2sad_jax.data import in_file, prepared, tfds
from e2sad_jax.data.__main__ import main
from e2sad_jax.errors import DataError
from e2sad_jax.runs import parameters, run
from e2sad_jax.training import configure

pytestmark = pytest.mark.usefixtures("offline")
F = library.features
PICTURE, KIND = F.Image(shape=(None, None, 3)), F.ClassLabel(names=["a", "b", "c"])
OTHERS = {"text": F.Text(), "boxes": F.Sequence({"box": F.BBoxFeature(), "id": np.int64}), "more": {"image": PICTURE}}
OTHER = {"text": "any", "boxes": [{"box": F.BBox(0.0, 0.0, 1.0, 1.0), "id": 3}], "more": {"image": io.BytesIO(b"none")}}
SPLITS = {"train": 9, "validation": 5}


def image_of(split, index, shape=(10, 12, 3)):
    return np.random.default_rng([len(split), index]).integers(0, 256, shape, np.uint8)


def write(
    root,
    splits=SPLITS,
    features=None,
    *,
    name="mini_set",
    config="",
    version="1.2.3",
    example=lambda split, i: {"picture": PIL.Image.fromarray(image_of(split, i)), "kind": i % 3},
    **about,
):
    """Has the library write a set as array_record, and returns its folder."""

    class Builder(library.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = library.core.Version(version)
        BUILDER_CONFIGS = [library.core.BuilderConfig(name=config, version=version)] if config else []
        url_infos, pkg_dir_path = {}, None

        def _info(self):
            shown = F.FeaturesDict(features or {"picture": PICTURE, "kind": KIND} | OTHERS)
            return library.core.DatasetInfo(builder=self, features=shown, **about)

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split, count) for split, count in splits.items()}

        def _generate_examples(self, split, count):
            for i in range(count):
                yield i, ({} if features else OTHER) | example(split, i)

    Builder.name = name
    builder = Builder(data_dir=root, file_format="array_record")
    quiet = library.download.DownloadConfig(try_download_gcs=False)
    builder.download_and_prepare(download_dir=root.parent / "unused", download_config=quiet)
    return builder.data_path


@pytest.fixture
def root(tmp_path):
    return tmp_path / "root"


@pytest.fixture
def records(root):
    return root / "array_record"


def pairs(x, y):
    return sorted((image.tobytes(), int(label)) for image, label in zip(x, y, strict=True))


def written(split, shape=(10, 12, 3)):
    return pairs([image_of(split, i, shape) for i in range(SPLITS[split])], [i % 3 for i in range(SPLITS[split])])


def error_of(text, root, *words):
    with pytest.raises(DataError) as caught:
        data.load(text, root)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message, message
    return message


@pytest.mark.parametrize("asked", ["tfds:mini_set", "tfds:mini_set/small", "tfds:mini_set/small:1.2.3"])
def test_its_own_images_classes_and_splits(asked, root, records, monkeypatch, offline):
    write(records, config="small")
    for _ in range(2):  # decoded by the library, then read from the copy without it
        dataset = data.load(asked, root)
        assert (dataset.name, dataset.version) == (asked.removeprefix("tfds:").removesuffix(":1.2.3"), "1.2.3")
        assert (dataset.image_shape, dataset.num_classes, dataset.x_train.dtype) == ((10, 12, 3), 3, np.uint8)
        assert pairs(dataset.x_train, dataset.y_train) == written("train")
        assert pairs(dataset.x_test, dataset.y_test) == written("validation"), "there is no test split"
        monkeypatch.setattr(tfds, "read", None)
    assert offline == []
    assert "tensorflow" not in sys.modules


def test_a_large_set_is_decoded_to_a_file_and_stays_there(root, records, monkeypatch):
    write(records)
    whole = data.load("tfds:mini_set", root).sha256
    for copy in (root / "decoded").rglob("*.npz"):
        copy.unlink()
    monkeypatch.setattr(in_file, "LARGE", 1000)
    for _ in range(2):  # decoded, then read from the copy
        dataset = data.load("tfds:mini_set", root)
        assert in_file.is_in_file(dataset.x_train)
        assert dataset.sha256 == whole
        monkeypatch.setattr(tfds, "read", None)
    assert [path.name for path in (root / "decoded" / "tfds").iterdir()] == ["mini_set.npz"]


def test_a_test_split_comes_before_validation(root, records):
    write(records, {"train": 4, "validation": 3, "test": 2})
    assert len(data.load("tfds:mini_set", root).x_test) == 2


def test_chosen_splits_have_a_name_and_a_copy_of_their_own(root, records):
    write(records)
    whole = data.load("tfds:mini_set", root)
    for _ in range(2):
        chosen = data.load("tfds:mini_set@validation+train[:4],train[4:]", root)
        assert chosen.name == "mini_set@validation+train[:4],train[4:]"
        assert pairs(chosen.x_test, chosen.y_test) == pairs(whole.x_train[4:], whole.y_train[4:])
        first = np.concatenate([whole.x_test, whole.x_train[:4]]), np.concatenate([whole.y_test, whole.y_train[:4]])
        assert pairs(chosen.x_train, chosen.y_train) == pairs(*first)
    assert data.load("tfds:mini_set", root).sha256 == whole.sha256


def test_grey_images_and_the_supervised_keys(root, records):
    features = {
        "other": F.Image(shape=(4, 4, 3)),
        "picture": F.Image(shape=(6, 7, 1)),
        "coarse": F.ClassLabel(num_classes=2),
        "kind": KIND,
    }

    def example(split, i):
        grey = PIL.Image.fromarray(image_of(split, i, (6, 7)))
        return {
            "other": PIL.Image.fromarray(image_of(split, i, (4, 4, 3))),
            "picture": grey,
            "coarse": 0,
            "kind": i % 3,
        }

    write(records, features=features, supervised_keys=("picture", "kind"), example=example)
    dataset = data.load("tfds:mini_set", root)
    assert (dataset.image_shape, dataset.num_classes) == ((6, 7, 1), 3)
    assert pairs(dataset.x_train, dataset.y_train) == written("train", (6, 7))


def test_jpeg_files_as_pillow_decodes_them(root, records):
    def jpeg(split, i):
        stream = io.BytesIO()
        PIL.Image.fromarray(image_of(split, i)).save(stream, "jpeg")
        return io.BytesIO(stream.getvalue())

    write(records, example=lambda split, i: {"picture": jpeg(split, i), "kind": 0})
    expected = sorted(np.asarray(PIL.Image.open(jpeg("train", i))).tobytes() for i in range(SPLITS["train"]))
    assert sorted(image.tobytes() for image in data.load("tfds:mini_set", root).x_train) == expected


def test_the_newest_version_and_the_named_one(root, records):
    write(records, {"train": 4, "test": 2}, version="1.9.0")
    assert data.load("tfds:mini_set", root).version == "1.9.0"
    write(records, {"train": 5, "test": 2}, version="1.10.0")
    newest, named = data.load("tfds:mini_set", root), data.load("tfds:mini_set:1.9.0", root)  # not the copy of 1.9.0
    assert [(d.version, len(d.x_train)) for d in (newest, named)] == [("1.10.0", 5), ("1.9.0", 4)]


def test_the_library_s_own_folder_comes_second(root, records, tmp_path):
    write(tmp_path / "library", {"train": 4, "test": 2})
    assert len(data.load("tfds:mini_set", root).x_train) == 4
    write(records, {"train": 5, "test": 2})
    assert len(data.load("tfds:mini_set", root).x_train) == 5


def test_the_copy_is_of_the_records_that_are_there(root, records, caplog):
    write(records)
    data.load("tfds:mini_set", root)
    shutil.rmtree(records)
    assert len(data.load("tfds:mini_set", root).x_train) == 9, "the copy suffices"
    write(records, {"train": 4, "test": 2})
    assert len(data.load("tfds:mini_set", root).x_train) == 4
    assert "is of other records" in caplog.text


def test_as_one_file_and_in_commands(root, records, tmp_path, capsys):
    write(records, {"train": 30, "test": 10})
    to = tmp_path / "m.npz"
    assert main(["tfds:mini_set", f"--to={to}", f"--data_dir={root}"]) == 0
    assert "mini_set 1.2.3, 30 train and 10 test images of 10x12x3 uint8, 3 classes" in capsys.readouterr().out
    loaded = data.load(str(to))
    assert (loaded.name, loaded.sha256) == ("mini_set", data.load("tfds:mini_set", root).sha256)
    config = configure(data="tfds:mini_set:1.2.3@train,test", model="digits_cnn", data_dir=str(root))
    assert config.default_workdir().startswith("runs/mini_set-1.2.3-train-test-e2sad-")
    trained = types.SimpleNamespace(config=config, step=1, averaged=False, dataset={})
    assert parameters.about(trained)["config"]["data"] == config.data, "no path, of which the last part would be kept"
    table = run.describe(config)
    assert "float32[1,10,12,3]" in table
    assert "kernel: float32[256,3]" in table, "of the three classes"


def test_a_set_that_the_library_prepares_without_tensorflow(root, monkeypatch, capsys):
    """A builder that a user has registered, whose examples are no files to download."""

    class OwnGeneratedSet(library.core.GeneratorBasedBuilder):
        VERSION = library.core.Version("2.0.0")

        def _info(self):
            return library.core.DatasetInfo(builder=self, features=F.FeaturesDict({"picture": PICTURE, "kind": KIND}))

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in SPLITS}

        def _generate_examples(self, split):
            for i in range(SPLITS[split]):
                yield i, {"picture": PIL.Image.fromarray(image_of(split, i)), "kind": i % 3}

    dataset = data.load("tfds:own_generated_set", root)
    assert pairs(dataset.x_train, dataset.y_train) == written("train")
    assert (dataset.version, capsys.readouterr().out) == ("2.0.0", "")
    assert (root / "array_record" / "own_generated_set" / "2.0.0" / prepared.INFO).is_file()


@pytest.mark.parametrize("asked", ["fashion_mnist", "beans", "imagenette/160px"])
def test_a_set_that_the_library_prepares_with_tensorflow_alone(asked, root, records, offline):
    remedy = f"tfds build {asked} --file_format=array_record --data_dir=DIR"
    error_of(f"tfds:{asked}", root, "needs TensorFlow", remedy, f"put DIR/{asked.split('/')[0]} into {records}")
    assert offline == []
    assert not root.exists()


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("cifer10", ["did you mean tfds:cifar10"]),
        ("CIFAR10", ["did you mean tfds:cifar10"]),
        ("mini_sat", ["did you mean tfds:mini_set:1.2.3"]),
        ("mini_set:3.0.0", ["did you mean tfds:mini_set:1.2.3"]),
        ("mini_set/large", ["did you mean tfds:mini_set:1.2.3"]),
        ("qqqqqqqq", ["https://www.tensorflow.org/datasets/catalog", "array_record or ", "library, nor a set"]),
        ("imagenette/none", ["BuilderConfig none not found"]),
        ("mnist:1.0.0", ["version 1.0.0", "3.0.1"]),
        ("voc", ["the images (image) and the class labels ()", ".npz"]),
        ("mini_set@train,test", ["has no split 'test'; it has train, validation", "--data=tfds:mini_set@TRAIN,TEST"]),
        ("mini_set@train[,validation", ["has no split 'train['"]),
        ("mini_set@train[:0],validation", ["'train[:0]' holds no images"]),
        ("", ["must be tfds:NAME"]),
        ("mini_set/3.0.1", ["a version follows a colon, as in tfds:mini_set:3.0.1"]),
        ("mini_set@train", ["must be tfds:NAME", "@TRAIN,TEST"]),
        ("../mini_set", ["must be tfds:NAME"]),
        ("mini_set/..", ["must be tfds:NAME"]),
        ("mini_set:1.*.*", ["must be tfds:NAME"]),
        ("huggingface:x", ["must be tfds:NAME"]),
    ],
)
def test_what_cannot_be_found(asked, words, root, records, offline):
    write(records)
    error_of(f"tfds:{asked}", root, *words)
    assert offline == []
    assert not (root / "decoded").exists()


def examples(shape_of=lambda i: (10, 12, 3), label_of=lambda i: i % 3, images=("picture",), labels=("kind",)):
    def example(split, i):
        image = PIL.Image.fromarray(image_of(split, i, shape_of(i)))
        return dict.fromkeys(images, image) | dict.fromkeys(labels, label_of(i))

    return {"example": example}


@pytest.mark.parametrize(
    ("about", "words"),
    [
        (
            examples(lambda i: (10 + (i == 4), 12, 3)),
            ["(10, 12, 3)", "(11, 12, 3)", "images of one size are needed", ".npz"],
        ),
        (
            {"features": {"picture": F.Image(shape=(4, 4, 4)), "kind": KIND}} | examples(lambda i: (4, 4, 4)),
            ["'picture' is uint8 of shape (4, 4, 4)", "1 or 3 channels"],
        ),
        (
            {"features": {"a": PICTURE, "picture": PICTURE, "kind": KIND}} | examples(images=("a", "picture")),
            ["the images (a, picture)", ".npz"],
        ),
        (
            {"features": {"picture": PICTURE, "kind": KIND, "a": KIND}} | examples(labels=("kind", "a")),
            ["the class labels (a, kind)"],
        ),
        (
            {"features": {"picture": PICTURE, "kind": F.ClassLabel(num_classes=1)}} | examples(label_of=lambda i: 0),
            ["num_classes is 1"],
        ),
        (examples(label_of=lambda i: -1), ["y_train[0] is -1"]),
        ({"name": "mnist"}, ["claims to be mnist, but holds 9 train"]),
    ],
    ids=["shapes", "channels", "two images", "two labels", "one class", "no labels", "a known name"],
)
def test_what_cannot_be_trained_on(about, words, root, records):
    write(records, **about)
    asked = f"tfds:{about.get('name', 'mini_set')}"
    error_of(asked, root, f"{asked}: ", *words)
    assert not (root / "decoded").exists()


@pytest.mark.parametrize("damage", ["tfrecord", "bad info", "truncated", "gone", "no features"])
def test_records_that_cannot_be_read(damage, root, records):
    folder = write(records)
    (shard,) = folder.glob("*train*")
    words = [folder, "cannot be read", "delete that folder and prepare the set again"]
    if damage == "tfrecord":  # as the library says of the sets that it writes by default
        info = json.loads((folder / prepared.INFO).read_text())
        (folder / prepared.INFO).write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
        shard.rename(folder / "mini_set-train.tfrecord-00000-of-00001")
        words = ["holds tfrecord", f"tfds convert_format --dataset_version_dir={folder} --out_file_format=array_record"]
    elif damage == "bad info":
        (folder / prepared.INFO).write_text("{")
    elif damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:1000])
    elif damage == "gone":
        shard.unlink()
    else:
        (folder / "features.json").unlink()
    error_of("tfds:mini_set", root, *words)
    assert not (root / "decoded").exists()
