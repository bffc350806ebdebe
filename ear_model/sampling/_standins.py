import torch.nn.functional as F


def residual_norm(branch, branch_bias, stream, weight, bias, *, eps=1e-6, out_stream=None, dtype=None, scale=None):
    x = stream
    if branch is not None:
        x = stream + branch + branch_bias
        x = (stream if out_stream is None else out_stream).copy_(x)
    return x, F.layer_norm(x, x.shape[-1:], weight, bias, eps).to(dtype)


def attention(qkv, heads):
    q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind()
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def attention_rows(query, kv, heads):
    q = query.unflatten(2, (heads, -1)).transpose(1, 2)
    k, v = kv.unflatten(2, (2, heads, -1)).permute(2, 0, 3, 1, 4).unbind()
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def linear_gelu(x, weight, bias):
    return F.gelu(F.linear(x, weight, bias))
