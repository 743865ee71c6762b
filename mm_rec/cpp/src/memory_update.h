// Writes to the long-term memory, forward and backward; one task is one head of one sequence.
#pragma once

#include "memory.h"

namespace mm_rec {
namespace MM_LEVEL {

// Inputs of a call; k, v: (batch, context, heads, d).
template <class T>
struct UpdateInputs {
    MemoryShape shape;
    HeadRows<const T> k, v;
    const float* address;  // (heads, slots, d)
    const float* rate;     // (heads)
};

// Buffers of one task. Rows of the memory are `pitch` apart, rows of weights `slot_pitch`.
struct UpdateScratch {
    float *address, *transposed;              // (slots, pitch), (d, slot_pitch)
    float *k, *v;                             // (block, pitch), the tokens being written
    float *weight, *kept;                     // (block, slot_pitch): w, and products of 1 - w before each token
    float *key, *value, *mass, *decay;        // the memory, (slots, pitch), (slot_pitch)
    float *dkey, *dvalue, *dmass;             // backward: the gradient at the memory
    float *daddress, *dk, *dv;                // backward: (slots, pitch), (context, pitch)
    float *dmemory_transposed, *dweight, *ddecay;

    UpdateScratch(const MemoryShape& s, bool backward, Parts& parts) {
        const int64_t slots = s.slots * s.pitch(), tokens = s.block() * s.pitch(), weights = s.block() * s.slot_pitch();
        address = parts.take(slots);
        transposed = parts.take(s.pitch() * s.slot_pitch());
        k = parts.take(tokens);
        v = parts.take(tokens);
        weight = parts.take(weights);
        kept = parts.take(weights);
        key = parts.take(slots);
        value = parts.take(slots);
        mass = parts.take(s.slot_pitch());
        decay = parts.take(s.slot_pitch());
        if (!backward) return;
        dkey = parts.take(slots);
        dvalue = parts.take(slots);
        dmass = parts.take(s.slot_pitch());
        daddress = parts.take(slots);
        dk = parts.take(s.context() * s.pitch());
        dv = parts.take(s.context() * s.pitch());
        dmemory_transposed = parts.take(s.pitch() * s.slot_pitch());
        dweight = parts.take(weights);
        ddecay = parts.take(s.slot_pitch());
    }
};

template <class T>
static void load_address(const UpdateInputs<T>& in, int64_t head, UpdateScratch& w) {
    const MemoryShape& s = in.shape;
    for (int64_t slot = 0; slot < s.slots; ++slot)
        load_row(s.d, in.address + (head * s.slots + slot) * s.d, w.address + slot * s.pitch());
    transpose(s.slots, s.d, w.address, s.pitch(), w.transposed, s.slot_pitch());
}

// Load the tokens that are written at token t of sequence b, and compute their weights, the products of 1 - w
// before each of them, and the whole product, which is the decay of a slot.
template <class T>
static void update_weights(const UpdateInputs<T>& in, int64_t b, int64_t t, int64_t head, UpdateScratch& w) {
    const MemoryShape& s = in.shape;
    const int64_t pitch = s.pitch(), slot_pitch = s.slot_pitch();
    for (int64_t p = 0; p < s.block(); ++p) {  // W tokens before token t is row t of the context
        const int64_t row = b * s.context() + t + p, end = s.batch * s.context();
        load_row(s.d, in.k.at(row, end, head, s.d), w.k + p * pitch);
        load_row(s.d, in.v.at(row, end, head, s.d), w.v + p * pitch);
    }
    product<false>(s.block(), slot_pitch, s.d, w.k, pitch, 1, w.transposed, slot_pitch, w.weight, slot_pitch);
    for (int64_t i = 0; i < slot_pitch; i += W) store(w.decay + i, splat(1.0f));
    for (int64_t p = 0; p < s.block(); ++p) {
        float* logit = w.weight + p * slot_pitch;
        const float scale = in.rate[head] / exponentials(s.slots, logit);
        for (int64_t i = 0; i < slot_pitch; i += W) {
            const vf weight = load(logit + i) * scale, product = load(w.decay + i);
            store(logit + i, weight);
            store(w.kept + p * slot_pitch + i, product);
            store(w.decay + i, product * (1.0f - weight));
        }
    }
    if (s.at(b, t) == s.window) memset(w.decay, 0, slot_pitch * sizeof(float));  // a document's first write
}

MM_INLINE void scale_rows(const MemoryShape& s, const float* factor, float* x) {
    for (int64_t slot = 0; slot < s.slots; ++slot)
        for (int64_t i = 0; i < s.pitch(); i += W) store(x + slot * s.pitch() + i, load(x + slot * s.pitch() + i) * factor[slot]);
}

// The memory of one head as `version` of the result.
static void store_version(const MemoryShape& s, const UpdateScratch& w, int64_t at, const Memory<float>& out) {
    for (int64_t slot = 0; slot < s.slots; ++slot) {
        store_row(s.d, w.key + slot * s.pitch(), out.key + (at + slot) * s.d);
        store_row(s.d, w.value + slot * s.pitch(), out.value + (at + slot) * s.d);
    }
    memcpy(out.mass + at, w.mass, s.slots * sizeof(float));
}

// The memory of one head before any of the writes.
static void load_memory(const MemoryShape& s, int64_t first, const Memory<const float>& initial, UpdateScratch& w) {
    for (int64_t slot = 0; slot < s.slots; ++slot) {
        load_row(s.d, initial.key + (first + slot) * s.d, w.key + slot * s.pitch());
        load_row(s.d, initial.value + (first + slot) * s.d, w.value + slot * s.pitch());
    }
    memset(w.mass, 0, s.slot_pitch() * sizeof(float));
    memcpy(w.mass, initial.mass + first, s.slots * sizeof(float));
}

// The write at token t, in w.
template <class T>
static void update_write(const UpdateInputs<T>& in, int64_t b, int64_t t, int64_t head, UpdateScratch& w) {
    const MemoryShape& s = in.shape;
    const int64_t pitch = s.pitch(), slot_pitch = s.slot_pitch();
    update_weights(in, b, t, head, w);
    scale_rows(s, w.decay, w.key);
    scale_rows(s, w.decay, w.value);
    product<true>(s.slots, pitch, s.block(), w.weight, 1, slot_pitch, w.k, pitch, w.key, pitch);
    product<true>(s.slots, pitch, s.block(), w.weight, 1, slot_pitch, w.v, pitch, w.value, pitch);
    for (int64_t i = 0; i < slot_pitch; i += W) {
        vf added = {};
        for (int64_t p = 0; p < s.block(); ++p) added += load(w.weight + p * slot_pitch + i);
        store(w.mass + i, load(w.decay + i) * load(w.mass + i) + added);
    }
}

template <class T>
static void update_task(const UpdateInputs<T>& in, const Memory<const float>& initial, const Memory<float>& out,
                        int64_t b, int64_t head, UpdateScratch& w) {
    const MemoryShape& s = in.shape;
    load_address(in, head, w);
    load_memory(s, (b * s.heads + head) * s.slots, initial, w);
    store_version(s, w, slot_index(s, b, 0, head), out);
    int64_t version = 0;
    for (int64_t t = 0; t < s.time; ++t) {
        if (!s.writes(b, t)) continue;
        update_write(in, b, t, head, w);
        store_version(s, w, slot_index(s, b, ++version, head), out);
    }
    while (++version < s.versions()) store_version(s, w, slot_index(s, b, version, head), out);
}

// key0, value0, mass0 (batch, heads, slots[, d]) in `initial`; all versions go to `out`.
template <class T>
static int memory_update(const UpdateInputs<T>& in, const Memory<const float>& initial, const Memory<float>& out,
                         int threads) {
    const auto make = [&](Parts& parts) { return UpdateScratch(in.shape, false, parts); };
    return for_each_head(in.shape, threads, make, [&](int64_t b, int64_t head, UpdateScratch& w) {
        update_task(in, initial, out, b, head, w);
    });
}

// Add the gradient at one version to that at the memory.
static void add_version(const MemoryShape& s, int64_t at, const Memory<const float>& d, UpdateScratch& w) {
    for (int64_t slot = 0; slot < s.slots; ++slot)
        for (int64_t i = 0; i < s.d; i += W) {
            float *key = w.dkey + slot * s.pitch() + i, *value = w.dvalue + slot * s.pitch() + i;
            store(key, load(key) + load(d.key + (at + slot) * s.d + i, s.d - i));
            store(value, load(value) + load(d.value + (at + slot) * s.d + i, s.d - i));
        }
    for (int64_t slot = 0; slot < s.slots; ++slot) w.dmass[slot] += d.mass[at + slot];
}

// The gradient at the decay of every slot, given the memory before the write.
static void decay_gradient(const MemoryShape& s, int64_t at, const Memory<const float>& before, UpdateScratch& w) {
    for (int64_t slot = 0; slot < s.slots; ++slot) {
        vf dot = {};
        for (int64_t i = 0; i < s.d; i += W) {
            dot += load(w.dkey + slot * s.pitch() + i) * load(before.key + (at + slot) * s.d + i, s.d - i);
            dot += load(w.dvalue + slot * s.pitch() + i) * load(before.value + (at + slot) * s.d + i, s.d - i);
        }
        w.ddecay[slot] = sum(dot) + w.dmass[slot] * before.mass[at + slot];
    }
}

// From gradients at the weights, in w.dweight, to gradients at the logits in the same place, and the share of
// the rate's gradient. The decay's derivative at a weight is minus the product of the other 1 - w: what came
// before (w.kept) times what comes after, without a division that a weight near 1 would spoil.
static float weight_gradient(const MemoryShape& s, float rate, bool first, UpdateScratch& w) {
    const int64_t slot_pitch = s.slot_pitch();
    const float inverse_rate = rate > 0 ? 1.0f / rate : 0.0f;
    float drate = 0;
    float* after = w.decay;
    for (int64_t i = 0; i < slot_pitch; i += W) store(after + i, splat(1.0f));
    for (int64_t p = s.block() - 1; p >= 0; --p) {
        const float* weight = w.weight + p * slot_pitch;
        float* d = w.dweight + p * slot_pitch;
        vf dot = {};
        for (int64_t i = 0; i < slot_pitch; i += W) {
            const vf others = load(w.kept + p * slot_pitch + i) * load(after + i);
            vf g = load(d + i) + load(w.dmass + i);
            if (!first) g -= load(w.ddecay + i) * others;
            store(d + i, g);
            dot += g * load(weight + i);
            store(after + i, load(after + i) * (1.0f - load(weight + i)));
        }
        const float mean = sum(dot) * inverse_rate;  // of d under the softmax
        drate += mean;
        for (int64_t i = 0; i < slot_pitch; i += W) store(d + i, load(weight + i) * (load(d + i) - mean));
    }
    return drate;
}

// One write back: from the gradient at the memory after it to those of its tokens, the address and the rate;
// the gradient at the memory before it stays in w.
template <class T>
static float update_write_back(const UpdateInputs<T>& in, const Memory<const float>& memory, int64_t b, int64_t t,
                               int64_t head, int64_t version, UpdateScratch& w) {
    const MemoryShape& s = in.shape;
    const int64_t pitch = s.pitch(), slot_pitch = s.slot_pitch(), before = slot_index(s, b, version - 1, head);
    const bool first = s.at(b, t) == s.window;
    update_weights(in, b, t, head, w);
    float *dk = w.dk + t * pitch, *dv = w.dv + t * pitch;
    product<true>(s.block(), pitch, s.slots, w.weight, slot_pitch, 1, w.dkey, pitch, dk, pitch);
    product<true>(s.block(), pitch, s.slots, w.weight, slot_pitch, 1, w.dvalue, pitch, dv, pitch);
    transpose(s.slots, s.d, w.dkey, pitch, w.dmemory_transposed, slot_pitch);
    product<false>(s.block(), slot_pitch, s.d, w.k, pitch, 1, w.dmemory_transposed, slot_pitch, w.dweight, slot_pitch);
    transpose(s.slots, s.d, w.dvalue, pitch, w.dmemory_transposed, slot_pitch);
    product<true>(s.block(), slot_pitch, s.d, w.v, pitch, 1, w.dmemory_transposed, slot_pitch, w.dweight, slot_pitch);
    decay_gradient(s, before, memory, w);
    scale_rows(s, w.decay, w.dkey);
    scale_rows(s, w.decay, w.dvalue);
    for (int64_t slot = 0; slot < s.slots; ++slot) w.mass[slot] = w.dmass[slot] * w.decay[slot];
    const float drate = weight_gradient(s, in.rate[head], first, w);
    memcpy(w.dmass, w.mass, s.slots * sizeof(float));
    product<true>(s.block(), pitch, s.slots, w.dweight, slot_pitch, 1, w.address, pitch, dk, pitch);
    product<true>(s.slots, pitch, s.block(), w.dweight, 1, slot_pitch, w.k, pitch, w.daddress, pitch);
    return drate;
}

// Gradients of the inputs: dk, dv (batch, context, heads, d); daddress (batch, heads, slots, d) and drate
// (batch, heads), a share per sequence; dinitial (batch, heads, slots[, d]).
template <class T>
struct UpdateGradients {
    T* dk;
    T* dv;
    float* daddress;
    float* drate;
    Memory<float> dinitial;
};

template <class T>
static void update_task_backward(const UpdateInputs<T>& in, const Memory<const float>& memory,
                                 const Memory<const float>& dmemory, const UpdateGradients<T>& out, int64_t b,
                                 int64_t head, UpdateScratch& w) {
    const MemoryShape& s = in.shape;
    const int64_t pitch = s.pitch(), first = (b * s.heads + head) * s.slots;
    load_address(in, head, w);
    int64_t version = 0;
    for (int64_t t = 0; t < s.time; ++t) version += s.writes(b, t);
    memset(w.dkey, 0, s.slots * pitch * sizeof(float));
    memset(w.dvalue, 0, s.slots * pitch * sizeof(float));
    memset(w.dmass, 0, s.slot_pitch() * sizeof(float));
    memset(w.ddecay, 0, s.slot_pitch() * sizeof(float));
    memset(w.daddress, 0, s.slots * pitch * sizeof(float));
    memset(w.dk, 0, s.context() * pitch * sizeof(float));
    memset(w.dv, 0, s.context() * pitch * sizeof(float));
    for (int64_t v = s.versions() - 1; v >= version; --v) add_version(s, slot_index(s, b, v, head), dmemory, w);
    float drate = 0;
    for (int64_t t = s.time - 1; t >= 0; --t) {
        if (!s.writes(b, t)) continue;
        drate += update_write_back(in, memory, b, t, head, version, w);
        add_version(s, slot_index(s, b, --version, head), dmemory, w);
    }
    for (int64_t slot = 0; slot < s.slots; ++slot) {
        store_row(s.d, w.dkey + slot * pitch, out.dinitial.key + (first + slot) * s.d);
        store_row(s.d, w.dvalue + slot * pitch, out.dinitial.value + (first + slot) * s.d);
        store_row(s.d, w.daddress + slot * pitch, out.daddress + (first + slot) * s.d);
    }
    memcpy(out.dinitial.mass + first, w.dmass, s.slots * sizeof(float));
    out.drate[b * s.heads + head] = drate;
    for (int64_t c = 0; c < s.context(); ++c) {
        const int64_t to = ((b * s.context() + c) * s.heads + head) * s.d;
        store_row(s.d, w.dk + c * pitch, out.dk + to);
        store_row(s.d, w.dv + c * pitch, out.dv + to);
    }
}

// `memory` is the result of memory_update and `dmemory` the gradient at it.
template <class T>
static int memory_update_backward(const UpdateInputs<T>& in, const Memory<const float>& memory,
                                  const Memory<const float>& dmemory, const UpdateGradients<T>& out, int threads) {
    const auto make = [&](Parts& parts) { return UpdateScratch(in.shape, true, parts); };
    return for_each_head(in.shape, threads, make, [&](int64_t b, int64_t head, UpdateScratch& w) {
        update_task_backward(in, memory, dmemory, out, b, head, w);
    });
}

}  // namespace MM_LEVEL
}  // namespace mm_rec
