"""Train a Transformer with a loop you can read: each step that a Trainer takes for you is a line.

    python train.py                             the small model, about a minute on two CPU cores
    python train.py --dim 512 --num-heads 8     the paper's size
    python train.py --resume runs/<name>        resume a stopped run, bit for bit

Read train_minimal.py first: the same loop without options. PyTorch Lightning runs the lines tagged
[hidden: ...] out of sight; comparison/README.md explains each of them under its tag.
"""

import copy
import math
import time

import transformer_scratch  # noqa: F401 - first: it says how threads wait

# isort: split
import torch
import wandb
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from transformer_scratch import summary
from transformer_scratch.batches import Batch, make_loaders, until_stopped
from transformer_scratch.config import load_config
from transformer_scratch.errors import exits_cleanly
from transformer_scratch.evaluation import exact_match, predict
from transformer_scratch.hardware import (
    AUTOCAST_TYPES,
    choose_device,
    choose_kernels,
    choose_threads,
    compile_model,
    keep_freed_memory,
)
from transformer_scratch.model import Transformer
from transformer_scratch.optimizer import average_weights, can_fuse, make_optimizer, make_schedule
from transformer_scratch.processes import start_processes
from transformer_scratch.progress import Progress
from transformer_scratch.random_state import RandomState, seed_everything
from transformer_scratch.run_folder import RunFolder
from transformer_scratch.signals import Signals
from transformer_scratch.tracking import in_background, log_results, log_table, start_wandb


def token_loss(
    network: nn.Module, batch: Batch, pad_id: int, label_smoothing: float = 0.0
) -> Tensor:
    """The mean cross-entropy over the target tokens of a batch, without padding. -> scalar.

    label_smoothing: the share of a token's probability that is spread over all (section 5.4).
    """
    logits = network(batch.source, batch.decoder_input, batch.source_is_padded)  # (B, T, V)
    return F.cross_entropy(
        logits.flatten(0, 1),
        batch.target.flatten(),
        ignore_index=pad_id,
        label_smoothing=label_smoothing,
    )


@torch.inference_mode()  # [hidden: no gradients outside training]
def evaluate(
    model: Transformer, loader: DataLoader, autocast: torch.amp.autocast, device: torch.device
) -> tuple[Tensor, int, list[Tensor]]:
    """-> this process's sum of loss x tokens, its number of tokens, and the loss of each batch."""
    loss_sum, num_tokens, losses = torch.zeros((), device=device), 0, []
    for batch in loader:
        with autocast:
            loss = token_loss(model, batch.to(device), model.pad_id)
        loss_sum += loss * batch.num_tokens
        num_tokens += batch.num_tokens
        losses.append(loss)
    return loss_sum, num_tokens, losses


def log(row: dict) -> None:
    """Send a row to W&B, in a thread of its own: a server that is down must not stop training."""
    in_background(wandb.log, row)


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    # ------------------------------------------------------------------------------- 1. Settings

    # What the flags leave open is chosen by task, size or hardware; the reasons are printed below.
    # Memory that one step frees is kept for the next: taking it from the system again costs time.
    processes = start_processes()
    config, task, reasons, checkpoint = load_config(arguments, processes)
    device, _ = choose_device(config.accelerator, processes.local_rank)
    reasons["threads"] = choose_threads(config.dim, config.batch_size)
    keep_freed_memory()

    # A signal is only recorded on arrival; the loop acts on it where the state can be saved.
    signals = Signals(processes)

    # Everything random below follows from the seed: weights, order of the data, dropout.
    seed_everything(config.seed)  # [hidden: seeding]

    # ----------------------------------------------------------------------------------- 2. Data

    # Pairs held out of training show whether the model has learned the rule or only the examples.
    splits = task.splits
    train_loader, val_loader, test_loader = make_loaders(config, task, processes, device)

    # ------------------------------------------------------------ 3. Model, optimizer, precision

    # The model moves first, as PyTorch asks: an optimizer holds on to the parameters it is given.
    model = Transformer.from_config(config, task)
    model.to(device)  # [hidden: model to the device]
    optimizer = make_optimizer(model, config.lr, config.weight_decay, can_fuse(config.amp, device))
    scheduler = make_schedule(optimizer, config.warmup_steps, config.schedule)

    # Weights jump about from update to update; their average answers better. It is not trained,
    # only judged: validated, tested and kept as the best.
    averaged = copy.deepcopy(model) if config.average else None
    judged = averaged or model

    # torch.amp with device "cuda" replaces torch.cuda.amp, deprecated since PyTorch 2.4. Small fp16
    # gradients would become zero: the scaler multiplies the loss before the backward pass and
    # divides the gradients after it. Without fp16 it does nothing. What stays in float32 a GPU may
    # multiply in TF32, a little less precisely and much faster.
    dtype = AUTOCAST_TYPES[config.amp]
    autocast = torch.amp.autocast(device.type, dtype=dtype, enabled=dtype is not None)
    scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
    choose_kernels()

    # `model` owns the weights; `network` is what training calls. With several processes it also
    # averages the gradients over them.
    if config.compile:
        reasons["compile"] = compile_model(model)
    network = model
    if processes.world_size > 1:
        network = DistributedDataParallel(model)  # [hidden: gradients averaged over the processes]
        network.broadcast_buffers = False  # its only buffer, the table of positions, is constant
        # Up to here all processes drew the same random numbers, so they start with the same
        # weights. From here on dropout must differ between them.
        seed_everything(config.seed + processes.rank)

    # ------------------------------------------------------------------------ 4. Run and resume

    # Everything the next update depends on; this is what a checkpoint holds.
    progress = Progress(device)
    everything = {
        "task": task,
        "model": model,
        "averaged": averaged,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "scaler": scaler,
        "progress": progress,
        "rng": RandomState(),
    }
    run = RunFolder(config, processes, checkpoint)
    if checkpoint and checkpoint["epoch"] >= config.max_epochs and run.is_finished():
        summary.print_finished(run, config)
        return
    run.keep_pairs(task)
    if checkpoint:
        run.restore(everything, checkpoint)
    else:
        # Saved before the first update, so that a run can be resumed whatever happens to it.
        run.save(everything)

    where_to_look = start_wandb(config, run, signals)
    summary.print_start(config, reasons, model, task, run, where_to_look)
    batches_per_epoch = len(train_loader.sampler)
    updates_per_epoch = math.ceil(batches_per_epoch / config.accumulate)
    bar = summary.progress_bar(config.max_epochs * updates_per_epoch, progress.step, run)
    scale = scaler.get_scale()  # kept, so that each update waits for the GPU only once

    # ----------------------------------------------------------------------------- 5. The epochs

    for epoch in range(progress.epoch, config.max_epochs):
        # Train mode switches dropout on. Without --average, validation has switched it off.
        model.train()  # [hidden: train mode]

        # The order depends on seed and epoch alone; a resumed run skips the batches it has done.
        train_loader.sampler.set_epoch(epoch, progress.batch)  # [hidden: a new order every epoch]

        # For the tokens per second: a resumed epoch has counted some tokens already.
        started_at, tokens_before = time.perf_counter(), progress.epoch_tokens
        update_loss = torch.zeros((), device=device)

        for batch in until_stopped(train_loader, signals):
            if batch is None:
                # A data worker hangs, and a signal asks to stop. Between two updates the state can
                # be saved, unless other processes would have to take part.
                if progress.batch % config.accumulate == 0 and processes.world_size == 1:
                    run.save(everything)
                raise summary.stopped(signals.received, run, progress.step)

            batch = batch.to(device)  # [hidden: batch to the device]
            progress.batch += 1
            epoch_ends = progress.batch == batches_per_epoch
            update_ends = epoch_ends or progress.batch % config.accumulate == 0

            # In the mean over a batch a token weighs more the fewer tokens there are. This factor
            # undoes that: every token of the epoch counts the same. And where DDP averages the
            # gradients of the processes, we want their sum: hence world_size.
            weight = batch.num_tokens / batch.mean_update_tokens * processes.world_size

            # Processes exchange their gradients once an update, in the backward pass of its last
            # batch. This is the switch that DDP's no_sync() sets; a plain model ignores it.
            network.require_backward_grad_sync = update_ends  # [hidden: no_sync]

            # The forward pass computes in half precision where that is safe. Backward adds to the
            # gradients that are there, so several batches can make up one update.
            with autocast:  # [hidden: autocast]
                loss = token_loss(network, batch, task.pad_id, config.label_smoothing)
            scaler.scale(loss * weight).backward()  # [hidden: backward]

            # What is reported is the plain mean over the update's tokens. This batch's share of
            # them is 1 with one process and without --accumulate; flush() adds up the processes.
            share = batch.num_tokens / batch.update_tokens
            update_loss += loss.detach() * share
            progress.epoch_loss += loss.detach() * batch.num_tokens
            progress.epoch_tokens += batch.num_tokens
            if not update_ends:
                continue  # [hidden: accumulation]

            # The norm to clip by is that of the true gradients, not of the scaled ones. Infinity
            # clips nothing, but the norm is still computed: it shows trouble before the loss does.
            scaler.unscale_(optimizer)  # [hidden: unscale before clipping]
            max_norm = config.clip_norm or math.inf
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)  # [hidden: clipping]

            # Where fp16 gradients have overflowed, the scaler leaves the weights alone and lowers
            # its scale. Such an update was skipped, and the schedule must not count it.
            scaler.step(optimizer)  # [hidden: optimizer step]
            scaler.update()  # [hidden: scaler update]
            scale_before, scale = scale, scaler.get_scale()
            skipped = scale < scale_before
            lr = scheduler.get_last_lr()[0]  # the one that this update used
            if not skipped:
                scheduler.step()  # [hidden: schedule]
            if averaged and not skipped:
                updates = scheduler.last_epoch  # PyTorch's name for the updates done
                average_weights(averaged, model, config.average, updates)  # [hidden: averaging]
            optimizer.zero_grad()  # [hidden: zero_grad]

            # Loss and norm stay on the device for now: reading them would wait for it. A step is an
            # attempt, skipped or not.
            progress.step += 1
            row = {"step": progress.step, "epoch": epoch, "train/loss_step": update_loss}
            row |= {"lr": lr, "grad_norm": grad_norm}
            if skipped:
                row["skipped"] = True
            run.record(row)
            update_loss = torch.zeros((), device=device)

            # Numbers are read before the weights are saved: the first one that is not finite ends
            # the run here. The state is saved before anything is shown, so that neither a broken
            # terminal nor a dead logger can prevent a save that is due.
            stop_signal = signals.exchange()
            save_due = config.save_every and progress.step % config.save_every == 0
            log_due = epoch_ends or progress.step % config.log_every == 0
            if stop_signal or save_due or log_due:  # [hidden: reading the loss only now and then]
                row = run.flush()
                if stop_signal or save_due:
                    run.save(everything)
                bar.set_postfix(loss=f"{row['train/loss_step']:.4f}", refresh=False)
                log(row)  # [hidden: logging]
            bar.update()
            if stop_signal:
                raise summary.stopped(stop_signal, run, progress.step)

        # Validation: the loss on pairs that were not trained, and how many of them the model
        # answers right when it has to go on from its own tokens.
        seconds = time.perf_counter() - started_at
        tokens = (progress.epoch_tokens - tokens_before) * processes.world_size
        judged.eval()  # [hidden: eval mode]
        row = {"step": progress.step, "epoch": epoch}
        total, count = progress.epoch_loss, progress.epoch_tokens
        row["train/loss_epoch"] = processes.mean(total, count)  # [hidden: epoch mean]
        loss_sum, num_tokens, val_losses = evaluate(judged, val_loader, autocast, device)
        row["val/loss_epoch"] = processes.mean(loss_sum, num_tokens)  # [hidden: validation]
        with autocast:
            answers = predict(judged, task, splits.val[: task.most_answers])
        row["val/exact_match"] = exact_match(answers)
        run.write(row)

        # The weights of the best epochs are kept, and the state for resuming with the next one.
        ranking = sorted([*progress.ranking, [row["val/loss_epoch"], epoch]])
        progress.ranking = ranking[: config.save_top_k]  # [hidden: the best k]
        weights = {"model": judged.state_dict(), "task": task.state_dict()}
        run.save_best(progress.ranking, epoch, step=progress.step, **weights)
        progress.start_epoch(epoch + 1)
        run.save(everything)  # [hidden: a checkpoint for resuming]

        summary.print_epoch(run, bar, row)
        for index, loss in enumerate(val_losses, start=epoch * len(val_losses)):
            log({"step": progress.step, "val/loss_step": loss, "val/batch": index})
        log({**row, "tokens/s": tokens / seconds})
        log_table(progress.step, "val/answers", answers, task)
        if stop_signal := signals.exchange():
            raise summary.stopped(stop_signal, run, progress.step)

    # ------------------------------------------------------------------------------- 6. The test

    # Test the weights one would use: those with the best validation loss.
    bar.close()
    best = run.load_best(progress.ranking)
    weights = best.get("averaged") or best["model"]  # the first where only last.pt is left
    judged.load_state_dict(weights)  # [hidden: the best weights, not the last]
    judged.eval()
    loss_sum, num_tokens, test_losses = evaluate(judged, test_loader, autocast, device)
    with autocast:
        answers = {
            "trained": predict(judged, task, splits.train),
            "test": predict(judged, task, splits.test),
        }
    if stop_signal := signals.exchange():
        raise summary.stopped(stop_signal, run, progress.step)
    row = {"step": progress.step, "epoch": config.max_epochs}
    row["test/loss_epoch"] = processes.mean(loss_sum, num_tokens)
    row["test/exact_match"] = exact_match(answers["test"])
    run.write(row)

    summary.print_end(run, row, answers)
    for index, loss in enumerate(test_losses):
        log({"step": progress.step, "test/loss_step": loss, "test/batch": index})
    log_results(run, row, judged, task)


if __name__ == "__main__":
    main()
