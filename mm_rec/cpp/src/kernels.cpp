// The C interface of the kernels, compiled once per level: every name ends in the level, for example
// mm_rec_scan_forward_avx512. Pointers may be null where the header says so; strides count elements; `type` is
// 0 for float32 and 1 for bfloat16. Functions that need scratch memory return 0, or 1 if there is none.

#include "export.h"
#include "gated_scan.h"
#include "loss.h"
#include "mdi.h"
#include "mixed_keys.h"
#include "norm.h"
#include "optimizer.h"
#include "recurrence_backward.h"
#include "retained_attention_backward.h"
#include "scan.h"
#include "window_attention_backward.h"

using namespace mm_rec::MM_LEVEL;

// Calls `body` with T the activation type.
template <class F>
static auto with_type(int type, F body) {
    return type == 0 ? body(float{}) : body(bf16{});
}
template <class T>
static const T* as(const void* p, T) {
    return static_cast<const T*>(p);
}
template <class T>
static T* as(void* p, T) {
    return static_cast<T*>(p);
}

MM_EXPORT(void, scan_forward)
(int64_t batch, int64_t time, int64_t columns, const float* a, int64_t a_row, const float* x, int64_t x_row,
 const float* s0, const uint8_t* reset, float* s, int threads) {
    scan_forward(batch, time, columns, a, a_row, x, x_row, s0, reset, s, threads);
}

MM_EXPORT(void, scan_backward)
(int64_t batch, int64_t time, int64_t columns, const float* ds, int64_t ds_row, const float* s, const float* a,
 int64_t a_row, const float* s0, const uint8_t* reset, float* da, float* dx, float* ds0, int threads) {
    scan_backward(batch, time, columns, ds, ds_row, s, a, a_row, s0, reset, da, dx, ds0, threads);
}

MM_EXPORT(int, recurrence_forward)
(int type, int64_t batch, int64_t time, int64_t heads, int64_t d, const float* z, int64_t z_row, const void* u,
 int64_t u_row, const float* gamma, int64_t gamma_row, const float* w_g, const float* h0, const uint8_t* reset,
 float* h, float* h_last, int threads) {
    return with_type(type, [&](auto t) {
        const RecurrenceInputs<decltype(t)> in{batch, time,  heads,     d,   z,  z_row, as(u, t),
                                               u_row, gamma, gamma_row, w_g, h0, reset};
        return int(!recurrence_forward(in, h, h_last, threads));
    });
}

MM_EXPORT(int64_t, recurrence_groups)(int64_t batch, int64_t heads) {
    const int group = recurrence_group(batch, heads);
    return (batch + group - 1) / group;
}

MM_EXPORT(int, recurrence_backward)
(int type, int64_t batch, int64_t time, int64_t heads, int64_t d, const float* z, int64_t z_row, const void* u,
 int64_t u_row, const float* gamma, int64_t gamma_row, const float* w_g, const float* h0, const uint8_t* reset,
 const float* h, const float* dh, int64_t dh_row, const float* dh_last, float* dz, void* du, float* dgamma,
 float* dw_g, float* dh0, int threads) {
    return with_type(type, [&](auto t) {
        const RecurrenceInputs<decltype(t)> in{batch, time,  heads,     d,   z,  z_row, as(u, t),
                                               u_row, gamma, gamma_row, w_g, h0, reset};
        const RecurrenceGradients<decltype(t)> out{dz, as(du, t), dgamma, dw_g, dh0};
        return int(!recurrence_backward(in, {dh, dh_row, dh_last}, out, h, threads));
    });
}

MM_EXPORT(void, mdi_forward)
(int type, int64_t rows, int64_t columns, const void* decay, int64_t decay_row, const float* decay_bias,
 const void* candidate, int64_t candidate_row, const void* gate, int64_t gate_row, const float* gate_bias,
 float* gamma, float* x, int threads) {
    with_type(type, [&](auto t) {
        mdi_forward(rows, columns, as(decay, t), decay_row, decay_bias, as(candidate, t), candidate_row, as(gate, t),
                    gate_row, gate_bias, gamma, x, threads);
    });
}

MM_EXPORT(int64_t, mdi_backward_scratch)(int64_t rows, int64_t columns) { return mdi_backward_scratch(rows, columns); }

MM_EXPORT(void, mdi_backward)
(int type, int64_t rows, int64_t columns, const float* dgamma, int64_t dgamma_row, const float* dx, int64_t dx_row,
 const void* decay, int64_t decay_row, const float* decay_bias, const void* candidate, int64_t candidate_row,
 const void* gate, int64_t gate_row, const float* gate_bias, void* ddecay, float* ddecay_bias, void* dcandidate,
 void* dgate, float* dgate_bias, float* scratch, int threads) {
    with_type(type, [&](auto t) {
        mdi_backward(rows, columns, dgamma, dgamma_row, dx, dx_row, as(decay, t), decay_row, decay_bias,
                     as(candidate, t), candidate_row, as(gate, t), gate_row, gate_bias, as(ddecay, t), ddecay_bias,
                     as(dcandidate, t), as(dgate, t), dgate_bias, scratch, threads);
    });
}

MM_EXPORT(void, gated_scan_forward)
(int type, int64_t batch, int64_t time, int64_t heads, int64_t d, const void* z, const void* u, const void* r,
 int64_t row, const void* decay, int64_t decay_row, const float* decay_bias, const float* gate_bias, const float* h0,
 const uint8_t* reset, float* h, void* y, int threads) {
    with_type(type, [&](auto t) {
        const GatedScanInputs<decltype(t)> in{batch, time,         heads,     d,          as(z, t),  as(u, t), as(r, t),
                                              row,   as(decay, t), decay_row, decay_bias, gate_bias, h0,       reset};
        gated_scan_forward(in, h, as(y, t), threads);
    });
}

MM_EXPORT(int, gated_scan_backward)
(int type, int64_t batch, int64_t time, int64_t heads, int64_t d, const void* z, const void* u, const void* r,
 int64_t row, const void* decay, int64_t decay_row, const float* decay_bias, const float* gate_bias, const float* h0,
 const uint8_t* reset, const float* h, const void* dy, int64_t dy_row, const float* dh_last, void* dz, void* du,
 void* dr, int64_t out_row, void* ddecay, float* ddecay_bias, float* dgate_bias, float* dh0, int threads) {
    return with_type(type, [&](auto t) {
        using T = decltype(t);
        const GatedScanInputs<T> in{batch, time,         heads,     d,          as(z, t),  as(u, t), as(r, t),
                                    row,   as(decay, t), decay_row, decay_bias, gate_bias, h0,       reset};
        const GatedScanGradients<T> out{as(dz, t),     as(du, t),   as(dr, t),  out_row,
                                        as(ddecay, t), ddecay_bias, dgate_bias, dh0};
        return int(!gated_scan_backward(in, {as(dy, t), dy_row, dh_last}, out, h, threads));
    });
}

MM_EXPORT(void, rms_norm_forward)
(int type, int out_type, int64_t rows, int64_t n, const void* x, int64_t inner, int64_t outer_stride,
 int64_t inner_stride, void* y, int threads) {
    with_type(type, [&](auto t) {
        with_type(out_type, [&](auto u) {
            const Rows<const decltype(t)> from{as(x, t), inner, outer_stride, inner_stride};
            rms_norm_forward(rows, n, from, as(y, u), threads);
        });
    });
}

MM_EXPORT(void, rms_norm_backward)
(int type, int out_type, int64_t rows, int64_t n, const void* dy, int64_t dy_inner, int64_t dy_outer_stride,
 int64_t dy_inner_stride, const void* x, int64_t inner, int64_t outer_stride, int64_t inner_stride, void* dx,
 int threads) {
    with_type(type, [&](auto t) {
        with_type(out_type, [&](auto u) {
            const Rows<const decltype(t)> from{as(x, t), inner, outer_stride, inner_stride};
            const Rows<const decltype(u)> gradient{as(dy, u), dy_inner, dy_outer_stride, dy_inner_stride};
            rms_norm_backward(rows, n, gradient, from, as(dx, t), threads);
        });
    });
}

MM_EXPORT(void, add_rms_norm_forward)
(int type, int64_t rows, int64_t n, const float* x, int64_t x_row, const void* delta, int64_t delta_row, float* total,
 void* normed, int threads) {
    with_type(type, [&](auto t) {
        add_rms_norm_forward(rows, n, x, x_row, as(delta, t), delta_row, total, as(normed, t), threads);
    });
}

MM_EXPORT(void, add_rms_norm_backward)
(int type, int64_t rows, int64_t n, const float* dtotal, int64_t dtotal_row, const void* dn, int64_t dn_row,
 const float* total, float* dx, void* ddelta, int threads) {
    with_type(type, [&](auto t) {
        add_rms_norm_backward(rows, n, dtotal, dtotal_row, as(dn, t), dn_row, total, dx, as(ddelta, t), threads);
    });
}

MM_EXPORT(void, readout_forward)
(int type, int64_t rows, int64_t heads, int64_t n, const float* h, int64_t h_row, const void* r, int64_t r_row, void* y,
 int threads) {
    with_type(type, [&](auto t) { readout_forward(rows, heads, n, h, h_row, as(r, t), r_row, as(y, t), threads); });
}

MM_EXPORT(void, readout_backward)
(int type, int64_t rows, int64_t heads, int64_t n, const void* dy, int64_t dy_row, const float* h, int64_t h_row,
 const void* r, int64_t r_row, float* dh, void* dr, int threads) {
    with_type(type, [&](auto t) {
        readout_backward(rows, heads, n, as(dy, t), dy_row, h, h_row, as(r, t), r_row, dh, as(dr, t), threads);
    });
}

MM_EXPORT(void, relu_squared_forward)(int type, int64_t n, const void* x, void* y, int threads) {
    with_type(type, [&](auto t) { relu_squared_forward(n, as(x, t), as(y, t), threads); });
}

MM_EXPORT(void, relu_squared_backward)
(int type, int64_t n, const void* dy, const void* x, void* dx, int threads) {
    with_type(type, [&](auto t) { relu_squared_backward(n, as(dy, t), as(x, t), as(dx, t), threads); });
}

MM_EXPORT(int, cross_entropy)
(int type, int64_t rows, int64_t columns, void* logits, const int64_t* target, const float* weight, float* nll,
 int gradient, int threads) {
    return with_type(type, [&](auto t) {
        return int(!cross_entropy(rows, columns, as(logits, t), target, weight, nll, gradient != 0, threads));
    });
}

MM_EXPORT(void, adamw_many)
(int64_t tensors, const int64_t* sizes, float* const* master, float* const* m, float* const* v, const void* const* grad,
 const int32_t* types, void* const* out, const float* settings, int threads) {
    static_assert(sizeof(AdamW) == 7 * sizeof(float), "settings are seven floats a tensor");
    const auto outs = reinterpret_cast<bf16* const*>(out);
    adamw({tensors, sizes, master, m, v, grad, types, outs, reinterpret_cast<const AdamW*>(settings)}, threads);
}

MM_EXPORT(void, muon_momentum)
(int64_t tensors, const int64_t* sizes, float* const* m, const void* const* grad, const int32_t* types, void* const* u,
 int u_type, float momentum, float grad_scale, int threads) {
    muon_momentum(tensors, sizes, m, grad, types, u, u_type, {momentum, grad_scale}, threads);
}

MM_EXPORT(void, muon_step)
(int64_t tensors, const int64_t* sizes, float* const* master, const void* const* u, int u_type, void* const* out,
 const float* settings, int threads) {
    static_assert(sizeof(MuonStep) == 2 * sizeof(float), "settings are two floats a tensor");
    muon_step(tensors, sizes, master, u, u_type, reinterpret_cast<bf16* const*>(out),
              reinterpret_cast<const MuonStep*>(settings), threads);
}

MM_EXPORT(double, sum_of_squares)
(int64_t tensors, const void* const* data, const int64_t* sizes, const int32_t* types, int threads) {
    return sum_of_squares(tensors, data, sizes, types, threads);
}

// Rows of heads come as the distances from sequence to sequence and from row to row.
MM_EXPORT(int, window_attention)
(int type, int64_t batch, int64_t time, int64_t window, int64_t heads, int64_t d, const int64_t* position,
 const void* q, int64_t q_sequence, int64_t q_row, const void* k, int64_t k_sequence, int64_t k_row, const void* v,
 int64_t v_sequence, int64_t v_row, const float* cosine, const float* sine, void* out, float* lse, int threads) {
    return with_type(type, [&](auto t) {
        using T = decltype(t);
        const AttentionInputs<T> in{{batch, time, window, heads, d, position}, {as(q, t), q_sequence, q_row},
                                    {as(k, t), k_sequence, k_row}, {as(v, t), v_sequence, v_row}, cosine, sine};
        return window_attention(in, as(out, t), lse, threads);
    });
}

MM_EXPORT(int, window_attention_backward)
(int type, int64_t batch, int64_t time, int64_t window, int64_t heads, int64_t d, const int64_t* position,
 const void* q, int64_t q_sequence, int64_t q_row, const void* k, int64_t k_sequence, int64_t k_row, const void* v,
 int64_t v_sequence, int64_t v_row, const float* cosine, const float* sine, const void* dout, int64_t dout_sequence,
 int64_t dout_row, const void* out, const float* lse, void* dq, void* dk, void* dv, int threads) {
    return with_type(type, [&](auto t) {
        using T = decltype(t);
        const AttentionInputs<T> in{{batch, time, window, heads, d, position}, {as(q, t), q_sequence, q_row},
                                    {as(k, t), k_sequence, k_row}, {as(v, t), v_sequence, v_row}, cosine, sine};
        const AttentionFromAbove<T> above{{as(dout, t), dout_sequence, dout_row},
                                          {as(out, t), time * heads * d, heads * d}, lse};
        return window_attention_backward(in, above, AttentionGradients<T>{as(dq, t), as(dk, t), as(dv, t)}, threads);
    });
}

MM_EXPORT(int, retain)
(int64_t batch, int64_t time, int64_t window, int64_t heads, int64_t slots, const int64_t* position, const float* score,
 const float* kept_score, int32_t* slot, int32_t* held, int threads) {
    return retain({{batch, time, window, heads, 1, position}, slots, score, kept_score}, {slot, held}, threads);
}

MM_EXPORT(int, retained_attention)
(int type, int64_t batch, int64_t time, int64_t window, int64_t heads, int64_t d, int64_t slots, const int64_t* position,
 const void* q, int64_t q_sequence, int64_t q_row, const void* k, int64_t k_sequence, int64_t k_row, const void* v,
 int64_t v_sequence, int64_t v_row, const float* score, const int32_t* slot, const int32_t* held, const void* kept_k,
 const void* kept_v, const float* kept_score, void* out, float* lse, int threads) {
    return with_type(type, [&](auto t) {
        const RetainedInputs<decltype(t)> in{{batch, time, window, heads, d, position}, slots,
                                             {as(q, t), q_sequence, q_row}, {as(k, t), k_sequence, k_row},
                                             {as(v, t), v_sequence, v_row}, score, slot, held, as(kept_k, t),
                                             as(kept_v, t), kept_score};
        return retained_attention(in, as(out, t), lse, threads);
    });
}

MM_EXPORT(int, retained_attention_backward)
(int type, int64_t batch, int64_t time, int64_t window, int64_t heads, int64_t d, int64_t slots, const int64_t* position,
 const void* q, int64_t q_sequence, int64_t q_row, const void* k, int64_t k_sequence, int64_t k_row, const void* v,
 int64_t v_sequence, int64_t v_row, const float* score, const int32_t* slot, const int32_t* held, const void* kept_k,
 const void* kept_v, const float* kept_score, const void* dout, int64_t dout_sequence, int64_t dout_row, const void* out,
 const float* lse, void* dq, void* dk, void* dv, float* dscore, void* dkept_k, void* dkept_v, float* dkept_score,
 int threads) {
    return with_type(type, [&](auto t) {
        using T = decltype(t);
        const RetainedInputs<T> in{{batch, time, window, heads, d, position}, slots, {as(q, t), q_sequence, q_row},
                                   {as(k, t), k_sequence, k_row}, {as(v, t), v_sequence, v_row}, score, slot, held,
                                   as(kept_k, t), as(kept_v, t), kept_score};
        const AttentionFromAbove<T> above{{as(dout, t), dout_sequence, dout_row},
                                         {as(out, t), time * heads * d, heads * d}, lse};
        return retained_attention_backward(in, above, {as(dq, t), as(dk, t), as(dv, t), dscore, as(dkept_k, t),
                                                       as(dkept_v, t), dkept_score}, threads);
    });
}

MM_EXPORT(int, mixed_keys)
(int type, int64_t batch, int64_t time, int64_t window, int64_t heads, int64_t d, int64_t reach, const int64_t* position,
 const void* k, int64_t k_sequence, int64_t k_row, const float* taps, void* key, int threads) {
    return with_type(type, [&](auto t) {
        const KeyInputs<decltype(t)> in{{batch, time, window, heads, d, position}, reach, {as(k, t), k_sequence, k_row},
                                        taps};
        return mixed_keys(in, as(key, t), threads);
    });
}

MM_EXPORT(int, mixed_keys_backward)
(int type, int64_t batch, int64_t time, int64_t window, int64_t heads, int64_t d, int64_t reach, const int64_t* position,
 const void* k, int64_t k_sequence, int64_t k_row, const float* taps, const void* dkey, int64_t dkey_sequence,
 int64_t dkey_row, void* dk, float* dtaps, int threads) {
    return with_type(type, [&](auto t) {
        const KeyInputs<decltype(t)> in{{batch, time, window, heads, d, position}, reach, {as(k, t), k_sequence, k_row},
                                        taps};
        return mixed_keys_backward(in, {as(dkey, t), dkey_sequence, dkey_row}, as(dk, t), dtaps, threads);
    });
}
