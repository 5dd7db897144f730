"""One of two processes that join samples of unequal number and length; fails where they are not joined as promised."""

import torch
from accelerate import Accelerator

from transformers_testa.momentum import ProcessRows
from transformers_testa.objectives import draw_hard_negatives


def main():
    # Processes with 1 and 3 samples, and texts of 4 and 2 tokens.
    rank = Accelerator(cpu=True).process_index
    num_rows, length = ((1, 4), (3, 2))[rank]
    rows = ProcessRows(torch.ones(num_rows, length, dtype=torch.long))
    assert (rows.own.start, rows.own.stop) == ((0, 1), (1, 4))[rank]
    texts = rows.gather(torch.full((num_rows, length), rank + 1))
    assert texts.tolist() == [[1, 1, 1, 1], *[[2, 2, 0, 0]] * 3]

    features = torch.full((num_rows, 2, 2), float(rank), requires_grad=True)
    gathered = rows.gather(features)
    assert gathered[:, 0, 0].tolist() == [0, 1, 1, 1]
    # Each process weighs the rows of both; what a row gets is the sum over the processes.
    weights = torch.arange(4.0) + 10 * rank
    (gathered.sum(dim=(1, 2)) * weights).sum().backward()
    assert features.grad[:, 0, 0].tolist() == ([10.0], [12.0, 14.0, 16.0])[rank]

    torch.manual_seed(rank)
    drawn = draw_hard_negatives(torch.zeros(4, 4), torch.arange(4))
    own = rows.own_share(drawn)
    torch.manual_seed(0)  # what process 0 drew holds for all
    assert torch.equal(
        own.text_of_video, draw_hard_negatives(torch.zeros(4, 4), torch.arange(4)).text_of_video[rows.own]
    )


if __name__ == "__main__":
    main()
