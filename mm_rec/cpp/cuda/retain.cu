// retain: which tokens a head keeps when they leave the window. One warp goes through the tokens of a head of a sequence, 32 at a
// time: most score below all that is kept, and only the others are taken one by one.
#include <climits>

#include "launch.cuh"
#include "retained_attention.cuh"

namespace mm_rec {
namespace {

constexpr unsigned kEmpty = 0x007fffffu, kNone = 0xffffffffu;  // ordered() of -inf, and above that of every score

// Scores as integers of the same order, in which equal ones are equal. NaN, which no head keeps, counts as -inf.
__device__ __forceinline__ unsigned ordered(float score) {
  const unsigned bits = __float_as_uint(score);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return kEmpty;
  if (bits == 0x80000000u) return 0x80000000u;  // -0, like 0
  return bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
}

struct RetainExtent {
  int64_t batch, time, heads;
  int window, slots;

  __host__ __device__ int64_t runs() const { return ceil_div(time, kRun); }
  // Slots of a lane; odd, so that the same slot of each lane is in a bank of its own.
  __host__ __device__ int share() const { return static_cast<int>(ceil_div(slots, 32)) | 1; }
};

// The slots of a head in shared memory: lane l has slots l * share() ... , and knows the lowest score among them.
struct Slots {
  unsigned* scores;  // ordered
  int* held;
  int count, share, lane;
  unsigned own;     // the lowest score of this lane's slots; kNone if it has none
  int first;        // the first slot of this lane that has it
  unsigned lowest;  // of all slots
  int tail;         // from this slot on all are empty

  __device__ __forceinline__ Slots(const RetainExtent& extent, const float* kept)
      : scores(reinterpret_cast<unsigned*>(dynamic_shared())), held(reinterpret_cast<int*>(scores + extent.slots)),
        count(extent.slots), share(extent.share()), lane(static_cast<int>(threadIdx.x)) {
    int occupied = 0;
    for (int j = lane; j < count; j += 32) {
      const unsigned score = ordered(kept[j]);
      scores[j] = score;
      held[j] = score > kEmpty ? j : -1;
      if (score > kEmpty) occupied = j + 1;
    }
    tail = __reduce_max_sync(kFullWarp, occupied);
    __syncwarp();
    look();
  }
  __device__ __forceinline__ void clear() {
    __syncwarp();
    for (int j = lane; j < count; j += 32) {
      scores[j] = kEmpty;
      held[j] = -1;
    }
    tail = 0;
    __syncwarp();
    look();
  }
  // Find the lowest scores anew.
  __device__ __forceinline__ void look() {
    own = kNone;
    first = 0;
    for (int j = lane * share; j < min(lane * share + share, count); ++j) {
      if (scores[j] < own) {
        own = scores[j];
        first = j;
      }
    }
    lowest = __reduce_min_sync(kFullWarp, own);
  }
  // The first of the slots with the lowest score, and the lane that has it.
  __device__ __forceinline__ int find(int& owner) const {
    owner = __ffs(static_cast<int>(__ballot_sync(kFullWarp, own == lowest))) - 1;
    return __shfl_sync(kFullWarp, first, owner);
  }
  // Put a token in the slot that find() told.
  __device__ __forceinline__ void replace(int owner, int slot, unsigned score, int source) {
    const unsigned others = __reduce_min_sync(kFullWarp, lane == owner ? kNone : own);
    if (lane == 0) {
      scores[slot] = score;
      held[slot] = source;
    }
    __syncwarp();
    unsigned least = kNone;
    int at = INT_MAX;
    for (int j = owner * share + lane; j < min(owner * share + share, count); j += 32) {
      if (scores[j] < least) {
        least = scores[j];
        at = j;
      }
    }
    const unsigned best = __reduce_min_sync(kFullWarp, least);
    at = __reduce_min_sync(kFullWarp, least == best ? at : INT_MAX);
    if (lane == owner) {
      own = best;
      first = at;
    }
    lowest = min(others, best);
    tail = max(tail, slot + 1);
    __syncwarp();
  }
  // Put the tokens of the lanes in `mask` in the empty slots at the end, which are enough; returns this lane's slot, or -1.
  __device__ __forceinline__ int fill(unsigned mask, unsigned score, int source) {
    const bool comes = (mask >> lane & 1) != 0;
    const int slot = tail + __popc(mask & ((1u << lane) - 1));
    if (comes) {
      scores[slot] = score;
      held[slot] = source;
    }
    tail += __popc(mask);
    __syncwarp();
    look();
    __syncwarp();
    return comes ? slot : -1;
  }
};

// The lowest `count` bits of a mask that are set.
__device__ __forceinline__ unsigned first_bits(unsigned mask, int count) {
  unsigned rest = mask;
  for (; count > 0 && rest != 0; --count) rest &= rest - 1;
  return mask & ~rest;
}

// What this lane's token does among the 32 from t on; returns the slot that is taken when it comes in, or -1.
__device__ __forceinline__ int take(Slots& slots, bool begins, unsigned score, int source) {
  int taken = -1;
  unsigned resets = __ballot_sync(kFullWarp, begins);
  unsigned pending = __ballot_sync(kFullWarp, score > slots.lowest) | resets;
  while (pending != 0) {
    const int next = __ffs(static_cast<int>(pending)) - 1;
    if ((resets >> next & 1) != 0) {
      slots.clear();
      resets &= resets - 1;
      pending = (__ballot_sync(kFullWarp, score > slots.lowest) | resets) & kFullWarp << next;
      continue;
    }
    int owner, last = next;
    const int slot = slots.find(owner);
    if (slots.lowest == kEmpty && slot == slots.tail) {
      const unsigned before = resets == 0 ? kFullWarp : (resets & -resets) - 1;  // the document's next begin
      const unsigned comers = first_bits(pending & before, slots.count - slots.tail);
      const int own = slots.fill(comers, score, source);
      if (own >= 0) taken = own;
      last = 31 - __clz(static_cast<int>(comers));
    } else {
      slots.replace(owner, slot, __shfl_sync(kFullWarp, score, next), __shfl_sync(kFullWarp, source, next));
      if (slots.lane == next) taken = slot;
    }
    pending = (__ballot_sync(kFullWarp, score > slots.lowest) | resets) & (kFullWarp - 1) << last;
  }
  return taken;
}

__global__ void __launch_bounds__(32)
    retain_kernel(const float* __restrict__ score, const int64_t* __restrict__ position, const float* __restrict__ kept_score,
                  int* __restrict__ slot, int* __restrict__ held, const RetainExtent extent) {
  const int64_t line = blockIdx.x, b = line / extent.heads, head = line % extent.heads;
  const int lane = threadIdx.x;
  const float* scores = score + b * (extent.window + extent.time) * extent.heads + head;
  const int64_t* positions = position + b * extent.time;
  int* at_run = held + line * (extent.runs() + 1) * extent.slots;
  const auto tell = [&](const Slots& slots) {
    for (int j = lane; j < extent.slots; j += 32) at_run[j] = slots.held[j];
    at_run += extent.slots;
    __syncwarp();
  };

  Slots slots(extent, kept_score + line * extent.slots);
  float own[kRun / 32];  // of the next run, on their way
  int64_t place[kRun / 32];
  const auto fetch = [&](int64_t t0) {
#pragma unroll
    for (int i = 0; i < kRun / 32; ++i) {
      const int64_t t = t0 + 32 * i + lane;
      own[i] = t < extent.time ? scores[t * extent.heads] : -INFINITY;
      place[i] = t < extent.time ? positions[t] : 1;
    }
  };
  fetch(0);
  for (int64_t t0 = 0; t0 < extent.time; t0 += kRun) {
    tell(slots);
    unsigned comes[kRun / 32];
    bool begins[kRun / 32];
#pragma unroll
    for (int i = 0; i < kRun / 32; ++i) {
      comes[i] = place[i] >= extent.window ? ordered(own[i]) : kEmpty;
      begins[i] = place[i] == 0;
    }
    fetch(t0 + kRun);
#pragma unroll
    for (int i = 0; i < kRun / 32; ++i) {
      const int64_t t = t0 + 32 * i + lane;
      const int taken = take(slots, begins[i], comes[i], static_cast<int>(extent.slots + t));
      if (t < extent.time) slot[line * extent.time + t] = taken;
    }
  }
  tell(slots);
}

}  // namespace
}  // namespace mm_rec

extern "C" int mm_rec_cuda_retain(const float* score, const int64_t* position, const float* kept_score, int* slot, int* held,
                                  int64_t batch, int64_t time, int64_t heads, int64_t window, int64_t slots,
                                  void* stream) {
  using namespace mm_rec;
  const RetainExtent extent{batch, time, heads, static_cast<int>(window), static_cast<int>(slots)};
  return launch(retain_kernel, dim3(static_cast<unsigned>(batch * heads)), dim3(32), 2 * sizeof(int) * slots, stream, score,
                position, kept_score, slot, held, extent);
}
