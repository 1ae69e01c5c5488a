"""Embedding: the store on disk, length buckets, and resuming."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from radit_jax.retrieval import embed

WIDTH = 8
TABLE_VE = np.random.default_rng(0).standard_normal((50, WIDTH)).astype(np.float32)


def tokenize(texts):
    """Characters to ids 1 .. 49, cut to 40 tokens."""
    return [[1 + ord(c) % 49 for c in text][:40] for text in texts]


@jax.jit
def encode(tokens_BL, mask_BL):
    """Attention to the first token: sensitive to order, to masks and to padding."""
    x_BLE = jnp.asarray(TABLE_VE)[tokens_BL]
    logits_BL = jnp.einsum("BE,BLE->BL", x_BLE[:, 0], x_BLE)
    weights_BL = jax.nn.softmax(jnp.where(mask_BL, logits_BL, -jnp.inf), axis=-1)
    return jnp.einsum("BL,BLE->BE", weights_BL, x_BLE)


def oracle(text):
    x_LE = TABLE_VE[tokenize([text])[0]]
    logits_L = x_LE @ x_LE[0]
    weights_L = np.exp(logits_L - logits_L.max())
    return weights_L / weights_L.sum() @ x_LE


def corpus(size, seed=0):
    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz "))
    return ["".join(rng.choice(letters, rng.integers(1, 60))) for _ in range(size)]


OPTIONS = {"shard_size": 10, "batch_tokens": 128, "max_length": 40}


def test_each_text_gets_its_own_embedding_whatever_its_batch(tmp_path):
    texts = corpus(37)
    expected_NE = np.stack([oracle(text) for text in texts])
    stats = embed.embed_passages(texts, tokenize, encode, tmp_path, **OPTIONS)
    store = embed.EmbeddingStore(tmp_path)
    assert store.shape == (37, WIDTH)
    np.testing.assert_allclose(store.rows(0, 37), expected_NE, atol=1e-5)
    for options in ({"batch_tokens": 1}, {"batch_tokens": 4096, "row_multiple": 8}):
        found_BE = embed.embed_queries(
            texts, tokenize, encode, max_length=40, **options
        )
        np.testing.assert_allclose(found_BE, expected_NE, atol=1e-5)
    assert stats.passages == 37
    assert stats.passages_per_second == pytest.approx(37 / stats.seconds)


def test_shapes_are_few_and_padding_is_counted():
    lengths = np.random.default_rng(1).integers(1, 101, 500)
    seen = []

    def spy(tokens_BL, mask_BL):
        assert tokens_BL.dtype == np.int32
        assert mask_BL.dtype == bool
        assert mask_BL.any(axis=1).all()  # no row is all padding
        assert tokens_BL.size <= 1024
        assert len(tokens_BL) % 2 == 0
        seen.append(tokens_BL.shape)
        return np.zeros((len(tokens_BL), WIDTH), np.float32)

    encoder = embed._BucketEncoder(spy, 1024, 100, 2, 0)
    # Two calls, as for two shards: what is left over differs, the shapes do not.
    for part in (lengths[:321], lengths[321:]):
        tokens = [[1] * n for n in part]
        done = [positions for positions, _ in encoder(tokens, "text", 0)]
        assert sorted(np.concatenate(done)) == list(range(len(part)))
    assert {length for _, length in seen} <= {32, 48, 64, 96, 100}
    assert len(encoder.shapes) <= 2 * 5
    assert set(seen) == encoder.shapes
    slots = sum(rows * length for rows, length in seen)
    assert encoder.padding == pytest.approx(1 - lengths.sum() / slots)
    assert encoder.padding < 0.25


class Told:
    """Counts what it is told of the progress."""

    skipped = updated = 0

    def skip(self, n):
        self.skipped += n

    def update(self, n):
        self.updated += n


def test_resume_writes_only_the_missing_shards(tmp_path):
    texts = corpus(35)
    embed.embed_passages(texts, tokenize, encode, tmp_path, **OPTIONS)
    whole_NE = np.array(embed.EmbeddingStore(tmp_path).rows(0, 35))
    (tmp_path / "embeddings-00002.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"embeddings-00002.*20 to 29"):
        embed.EmbeddingStore(tmp_path)
    read, progress = [], Told()

    class Spy(list):
        def __getitem__(self, position):
            read.append(position)
            return super().__getitem__(position)

    stats = embed.embed_passages(
        Spy(texts), tokenize, encode, tmp_path, progress=progress, **OPTIONS
    )
    assert read == list(range(20, 30))
    assert progress.skipped == 25
    assert progress.updated == 10
    assert stats.passages == 10
    np.testing.assert_array_equal(embed.EmbeddingStore(tmp_path).rows(0, 35), whole_NE)
    stats = embed.embed_passages(texts, tokenize, encode, tmp_path, **OPTIONS)
    assert stats.passages == 0
    assert stats.shapes == ()


def test_a_killed_run_leaves_whole_shards_and_goes_on(tmp_path, monkeypatch):
    texts = corpus(35)
    save = np.save

    def killed(file, rows):
        if (tmp_path / "embeddings-00001.npy").exists():
            file.write(b"half a shard")
            raise KeyboardInterrupt
        save(file, rows)

    monkeypatch.setattr(embed.np, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        embed.embed_passages(texts, tokenize, encode, tmp_path, **OPTIONS)
    monkeypatch.undo()
    shards = sorted(path.name for path in tmp_path.glob("*.npy"))
    assert shards == ["embeddings-00000.npy", "embeddings-00001.npy"]
    stats = embed.embed_passages(texts, tokenize, encode, tmp_path, **OPTIONS)
    assert stats.passages == 15
    expected_NE = np.stack([oracle(text) for text in texts])
    found_NE = embed.EmbeddingStore(tmp_path).rows(0, 35)
    np.testing.assert_allclose(found_NE, expected_NE, atol=1e-5)


def test_damaged_shards_are_refused_in_words(tmp_path):
    texts = corpus(20)
    embed.embed_passages(texts, tokenize, encode, tmp_path, **OPTIONS)
    path = tmp_path / "embeddings-00001.npy"
    whole = path.read_bytes()
    for content in (whole[:-4], whole[:20], b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"00001.npy is damaged.*\(10, 8\)"):
            embed.EmbeddingStore(tmp_path)
        with pytest.raises(ValueError, match=r"00001.npy is damaged"):
            embed.embed_passages(texts, tokenize, encode, tmp_path, **OPTIONS)
    for rows in (np.zeros((9, 8)), np.zeros((10, 7)), np.zeros((10, 8, 1))):
        np.save(path, rows.astype(np.float32))
        with pytest.raises(ValueError, match=r"expected float32 \(10, 8\), found"):
            embed.EmbeddingStore(tmp_path)
    np.save(path, np.zeros((10, 8)))
    with pytest.raises(ValueError, match="found float64"):
        embed.EmbeddingStore(tmp_path)


def test_another_corpus_or_encoder_is_refused(tmp_path):
    texts = corpus(20)
    embed.embed_passages(texts, tokenize, encode, tmp_path, **OPTIONS)
    with pytest.raises(ValueError, match=r"20 passages in shards of 10, expected 21"):
        embed.embed_passages([*texts, "one"], tokenize, encode, tmp_path, **OPTIONS)
    (tmp_path / "embeddings-00001.npy").unlink()
    with pytest.raises(ValueError, match=r"width 4, .* width 8.*another encoder"):
        embed.embed_passages(
            texts, tokenize, lambda t, m: encode(t, m)[:, :4], tmp_path, **OPTIONS
        )
    layout = json.loads((tmp_path / "embeddings.json").read_text())
    (tmp_path / "embeddings.json").write_text(json.dumps(layout | {"format": 9}))
    with pytest.raises(ValueError, match="expected format 1, found 9"):
        embed.EmbeddingStore(tmp_path)


def test_empty_inputs_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no passages"):
        embed.embed_passages([], tokenize, encode, tmp_path)
    with pytest.raises(ValueError, match="no queries"):
        embed.embed_queries([], tokenize, encode)
    with pytest.raises(ValueError, match="at least 1 passage"):
        embed.write_embeddings(np.zeros((0, 4), np.float32), tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no embeddings"):
        embed.EmbeddingStore(tmp_path / "nowhere")


def test_texts_that_cannot_be_encoded_are_named(tmp_path):
    texts = corpus(25)
    texts[17] = ""
    with pytest.raises(ValueError, match="passage 17 has 0 tokens, expected 1 to 40"):
        embed.embed_passages(texts, tokenize, encode, tmp_path / "a", **OPTIONS)
    with pytest.raises(ValueError, match="query 1 has 9 tokens, expected 1 to 8"):
        embed.embed_queries(["fits", "too long."], tokenize, encode, max_length=8)
    with pytest.raises(ValueError, match="gave 1 lists for 2 texts"):
        embed.embed_queries(["a", "b"], lambda texts: [[1]], encode)
    with pytest.raises(ValueError, match="batch_tokens must be at least 1, got 0"):
        embed.embed_queries(["a"], tokenize, encode, batch_tokens=0)


def test_embeddings_that_are_not_finite_name_the_passage(tmp_path):
    texts = corpus(25)
    texts[13] = "*bad"

    def breaks(tokens_BL, mask_BL):
        bad_B = tokens_BL[:, 0] == 1 + ord("*") % 49
        return np.where(bad_B[:, None], np.nan, np.asarray(encode(tokens_BL, mask_BL)))

    with pytest.raises(ValueError, match="passage 13 is not finite"):
        embed.embed_passages(texts, tokenize, breaks, tmp_path, **OPTIONS)
    assert not (tmp_path / "embeddings-00001.npy").exists()


def test_store_gathers_across_shards_from_memory_maps(tmp_path):
    rng = np.random.default_rng(2)
    embeddings_NE = rng.standard_normal((23, 5)).astype(np.float32)
    store = embed.write_embeddings(embeddings_NE, tmp_path, shard_size=7)
    assert len(store) == 23
    assert len(list(tmp_path.glob("embeddings-*.npy"))) == 4
    ids = rng.integers(0, 23, (6, 3))
    np.testing.assert_array_equal(store[ids], embeddings_NE[ids])
    for start, stop in [(0, 23), (6, 8), (7, 14), (20, 99), (5, 5), (30, 40)]:
        np.testing.assert_array_equal(
            store.rows(start, stop), embeddings_NE[start:stop]
        )
    assert not isinstance(store.rows(8, 12), np.memmap)
    with pytest.raises(IndexError, match=r"from 3 to 23 .* 23 passages"):
        store[np.array([3, 23])]
    with pytest.raises(IndexError, match="from -1"):
        store[np.array([-1])]


def test_bfloat16_embeddings_are_stored_in_float32(tmp_path):
    def half(tokens_BL, mask_BL):
        return encode(tokens_BL, mask_BL).astype(jnp.bfloat16)

    embed.embed_passages(corpus(5), tokenize, half, tmp_path, **OPTIONS)
    assert embed.EmbeddingStore(tmp_path).rows(0, 5).dtype == np.float32
