"""The whole training with no options, as you would write it on a whiteboard. Then read train.py.

    python train_minimal.py

On a CPU it computes the same numbers, bit for bit, as:
    python train.py --label-smoothing 0 --clip-norm 0 --warmup-steps 0 --average 0 --amp off
"""

import torch
from torch.nn import functional as F

from transformer_scratch.batches import Batch, BatchSampler, make_loader
from transformer_scratch.digits import Digits
from transformer_scratch.evaluation import exact_match, predict
from transformer_scratch.model import Transformer

SEED = 42
DIM, NUM_HEADS, NUM_LAYERS, DROPOUT = 32, 1, 6, 0.1
NUM_DATAS, BATCH_SIZE, NUM_EPOCHS = 38_400, 128, 3
LEARNING_RATE, WEIGHT_DECAY = 3e-3, 0.5


def token_loss(model: Transformer, batch: Batch) -> torch.Tensor:
    """The mean cross-entropy over the target tokens of a batch, without padding."""
    logits = model(batch.source, batch.decoder_input, batch.source_is_padded)  # (B, T, V)
    target = batch.target.flatten()
    return F.cross_entropy(logits.flatten(0, 1), target, ignore_index=model.pad_id)


def main() -> tuple[Transformer, list[float]]:
    """-> the trained model, the loss of every update."""
    torch.set_num_threads(1)  # as train.py does for a model of this size: same sums, same bits
    torch.manual_seed(SEED)

    task = Digits(num_datas=NUM_DATAS, seed=SEED)
    train_data, val_data, _ = task.datasets()
    train_loader = make_loader(BatchSampler(train_data, BATCH_SIZE, shuffle=True, seed=SEED))
    val_loader = make_loader(BatchSampler(val_data, BATCH_SIZE))

    model = Transformer(
        task.vocab_size, DIM, NUM_HEADS, NUM_LAYERS, dropout=DROPOUT, pad_id=task.pad_id
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), LEARNING_RATE, (0.9, 0.98), weight_decay=WEIGHT_DECAY, fused=True
    )

    losses = []
    for epoch in range(NUM_EPOCHS):
        model.train()
        train_loader.sampler.set_epoch(epoch)

        for batch in train_loader:
            # This weight makes every token count the same, whichever batch it is in.
            weight = batch.num_tokens / batch.mean_update_tokens
            loss = token_loss(model, batch)
            (loss * weight).backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())

        model.eval()
        loss_sum, num_tokens = 0.0, 0
        with torch.inference_mode():
            for batch in val_loader:
                loss_sum += token_loss(model, batch) * batch.num_tokens
                num_tokens += batch.num_tokens
        exact = exact_match(predict(model, task, task.splits.val))
        loss = loss_sum / num_tokens
        print(f"epoch {epoch}: validation loss {loss:.4f}, {exact:.0%} of unseen pairs exact")

    return model, losses


if __name__ == "__main__":
    main()
