// Root-mean-square norms and the gated readout (see rows.cuh for how threads share rows).
#include "rows.cuh"

namespace mm_rec {
namespace {

template <int Size, typename X, typename Y>
__global__ void __launch_bounds__(kThreads)
    rms_norm_kernel(const X* __restrict__ x, Y* __restrict__ y, const Rows rows, int lanes) {
  const Group group(lanes, rows.count);
  const X* from = x + rows.start(group.row);
  Y* to = y + group.row * rows.size;
  float squares = 0.0f;
  each_vector<Size>(group, rows.size, [&](int at) {
    float v[Size];
    load<Size>(from + at, v);
#pragma unroll
    for (int i = 0; i < Size; ++i) squares = fmaf(v[i], v[i], squares);
  });
  const float scale = inverse_rms(group.sum(squares), rows.size);
  if (!group.real) return;
  each_vector<Size>(group, rows.size, [&](int at) {
    float v[Size];
    load<Size>(from + at, v);
#pragma unroll
    for (int i = 0; i < Size; ++i) v[i] *= scale;
    store<Size>(to + at, v);
  });
}

// dx = r dy - x r^3 mean(dy x) with r = 1 / rms(x); `dx` is contiguous.
template <int Size, typename DY, typename X>
__global__ void __launch_bounds__(kThreads) rms_norm_backward_kernel(const DY* __restrict__ dy, const X* __restrict__ x,
                                                                     X* __restrict__ dx, const Rows rows, int lanes) {
  const Group group(lanes, rows.count);
  const X* from = x + rows.start(group.row);
  const int64_t start = group.row * rows.size;
  float squares = 0.0f, product = 0.0f;
  each_vector<Size>(group, rows.size, [&](int at) {
    float v[Size], g[Size];
    load<Size>(from + at, v);
    load<Size>(dy + start + at, g);
#pragma unroll
    for (int i = 0; i < Size; ++i) {
      squares = fmaf(v[i], v[i], squares);
      product = fmaf(v[i], g[i], product);
    }
  });
  const float scale = inverse_rms(group.sum(squares), rows.size);
  const float slope = scale * scale * scale * group.sum(product) / rows.size;
  if (!group.real) return;
  each_vector<Size>(group, rows.size, [&](int at) {
    float v[Size], g[Size];
    load<Size>(from + at, v);
    load<Size>(dy + start + at, g);
#pragma unroll
    for (int i = 0; i < Size; ++i) v[i] = scale * g[i] - slope * v[i];
    store<Size>(dx + start + at, v);
  });
}

template <int Size, typename X, typename Delta>
__global__ void __launch_bounds__(kThreads)
    add_rms_norm_kernel(const X* __restrict__ x, const Delta* __restrict__ delta, X* total, Delta* __restrict__ normed,
                        const Rows rows, int lanes) {
  const Group group(lanes, rows.count);
  const int64_t start = group.row * rows.size;
  float squares = 0.0f;
  each_vector<Size>(group, rows.size, [&](int at) {
    float v[Size], d[Size];
    load<Size>(x + start + at, v);
    load<Size>(delta + start + at, d);
#pragma unroll
    for (int i = 0; i < Size; ++i) {
      v[i] = to_float(from_float<X>(v[i] + to_float(from_float<X>(d[i]))));
      squares = fmaf(v[i], v[i], squares);
    }
    if (group.real) store<Size>(total + start + at, v);
  });
  const float scale = inverse_rms(group.sum(squares), rows.size);
  if (!group.real) return;
  each_vector<Size>(group, rows.size, [&](int at) {
    float v[Size];
    load<Size>(total + start + at, v);
#pragma unroll
    for (int i = 0; i < Size; ++i) v[i] *= scale;
    store<Size>(normed + start + at, v);
  });
}

template <int Size, typename X, typename Delta>
__global__ void __launch_bounds__(kThreads)
    add_rms_norm_backward_kernel(const X* __restrict__ dtotal, const Delta* __restrict__ dn, const X* __restrict__ total,
                                 X* __restrict__ dx, Delta* __restrict__ ddelta, const Rows rows, int lanes) {
  const Group group(lanes, rows.count);
  const int64_t start = group.row * rows.size;
  float squares = 0.0f, product = 0.0f;
  each_vector<Size>(group, rows.size, [&](int at) {
    float v[Size], g[Size];
    load<Size>(total + start + at, v);
    load<Size>(dn + start + at, g);
#pragma unroll
    for (int i = 0; i < Size; ++i) {
      squares = fmaf(v[i], v[i], squares);
      product = fmaf(v[i], g[i], product);
    }
  });
  const float scale = inverse_rms(group.sum(squares), rows.size);
  const float slope = scale * scale * scale * group.sum(product) / rows.size;
  if (!group.real) return;
  each_vector<Size>(group, rows.size, [&](int at) {
    float v[Size], g[Size], direct[Size] = {};
    load<Size>(total + start + at, v);
    load<Size>(dn + start + at, g);
    if (dtotal != nullptr) load<Size>(dtotal + start + at, direct);
#pragma unroll
    for (int i = 0; i < Size; ++i) v[i] = direct[i] + scale * g[i] - slope * v[i];
    store<Size>(dx + start + at, v);
    store<Size>(ddelta + start + at, v);
  });
}

// y = rms_norm(h) silu(r) per head. `rows` describes r; h and y are contiguous.
template <int Size, typename R>
__global__ void __launch_bounds__(kThreads)
    readout_kernel(const float* __restrict__ h, const R* __restrict__ r, R* __restrict__ y, const Rows rows, int lanes) {
  const Group group(lanes, rows.count);
  const R* gate = r + rows.start(group.row);
  const int64_t start = group.row * rows.size;
  float squares = 0.0f;
  each_vector<Size>(group, rows.size, [&](int at) {
    float v[Size];
    load<Size>(h + start + at, v);
#pragma unroll
    for (int i = 0; i < Size; ++i) squares = fmaf(v[i], v[i], squares);
  });
  const float scale = inverse_rms(group.sum(squares), rows.size);
  if (!group.real) return;
  each_vector<Size>(group, rows.size, [&](int at) {
    float v[Size], q[Size];
    load<Size>(h + start + at, v);
    load<Size>(gate + at, q);
#pragma unroll
    for (int i = 0; i < Size; ++i) v[i] *= scale * q[i] * sigmoid(q[i]);
    store<Size>(y + start + at, v);
  });
}

template <int Size, typename R>
__global__ void __launch_bounds__(kThreads)
    readout_backward_kernel(const R* __restrict__ dy, const float* __restrict__ h, const R* __restrict__ r,
                            float* __restrict__ dh, R* __restrict__ dr, const Rows rows, const Rows dr_rows, int lanes) {
  const Group group(lanes, rows.count);
  const R* gate = r + rows.start(group.row);
  R* dgate_to = dr + dr_rows.start(group.row);
  const int64_t start = group.row * rows.size;
  float squares = 0.0f, product = 0.0f;
  each_vector<Size>(group, rows.size, [&](int at) {
    float v[Size], q[Size], g[Size];
    load<Size>(h + start + at, v);
    load<Size>(gate + at, q);
    load<Size>(dy + start + at, g);
#pragma unroll
    for (int i = 0; i < Size; ++i) {
      squares = fmaf(v[i], v[i], squares);
      product = fmaf(v[i], g[i] * q[i] * sigmoid(q[i]), product);
    }
  });
  const float scale = inverse_rms(group.sum(squares), rows.size);
  const float slope = scale * scale * scale * group.sum(product) / rows.size;
  if (!group.real) return;
  each_vector<Size>(group, rows.size, [&](int at) {
    float v[Size], q[Size], g[Size];
    load<Size>(h + start + at, v);
    load<Size>(gate + at, q);
    load<Size>(dy + start + at, g);
#pragma unroll
    for (int i = 0; i < Size; ++i) {
      const float opened = sigmoid(q[i]), silu = q[i] * opened;
      const float dgate = g[i] * v[i] * scale * (opened + silu * (1.0f - opened));
      v[i] = scale * g[i] * silu - slope * v[i];
      q[i] = dgate;
    }
    store<Size>(dh + start + at, v);
    store<Size>(dgate_to + at, q);
  });
}

}  // namespace
}  // namespace mm_rec

extern "C" int mm_rec_cuda_rms_norm_forward(const void* x, int64_t x_dtype, int64_t inner, int64_t outer_stride,
                                            int64_t inner_stride, void* y, int64_t y_dtype, int64_t count, int64_t size,
                                            void* stream) {
  using namespace mm_rec;
  const Rows rows{count, static_cast<int>(size), static_cast<int>(inner), outer_stride, inner_stride};
  return by_vector(rows, [&](auto vector) {
    return by_type(x_dtype, [&](auto x_type) {
      return by_type(y_dtype, [&](auto y_type) {
        using X = decltype(x_type);
        using Y = decltype(y_type);
        const int lanes = lanes_a_row(rows.size, vector);
        return launch(rms_norm_kernel<vector, X, Y>, grid(rows, lanes), dim3(kThreads), 0, stream,
                      static_cast<const X*>(x), static_cast<Y*>(y), rows, lanes);
      });
    });
  });
}

extern "C" int mm_rec_cuda_rms_norm_backward(const void* dy, int64_t dy_dtype, const void* x, int64_t x_dtype,
                                             int64_t inner, int64_t outer_stride, int64_t inner_stride, void* dx,
                                             int64_t count, int64_t size, void* stream) {
  using namespace mm_rec;
  const Rows rows{count, static_cast<int>(size), static_cast<int>(inner), outer_stride, inner_stride};
  return by_vector(rows, [&](auto vector) {
    return by_type(dy_dtype, [&](auto dy_type) {
      return by_type(x_dtype, [&](auto x_type) {
        using DY = decltype(dy_type);
        using X = decltype(x_type);
        const int lanes = lanes_a_row(rows.size, vector);
        return launch(rms_norm_backward_kernel<vector, DY, X>, grid(rows, lanes), dim3(kThreads), 0, stream,
                      static_cast<const DY*>(dy), static_cast<const X*>(x), static_cast<X*>(dx), rows, lanes);
      });
    });
  });
}

extern "C" int mm_rec_cuda_add_rms_norm_forward(const void* x, int64_t x_dtype, const void* delta, int64_t delta_dtype,
                                                void* total, void* normed, int64_t count, int64_t size, void* stream) {
  using namespace mm_rec;
  const Rows rows = contiguous(count, size);
  return by_vector(rows, [&](auto vector) {
    return by_type(x_dtype, [&](auto x_type) {
      return by_type(delta_dtype, [&](auto delta_type) {
        using X = decltype(x_type);
        using Delta = decltype(delta_type);
        const int lanes = lanes_a_row(rows.size, vector);
        return launch(add_rms_norm_kernel<vector, X, Delta>, grid(rows, lanes), dim3(kThreads), 0, stream,
                      static_cast<const X*>(x), static_cast<const Delta*>(delta), static_cast<X*>(total),
                      static_cast<Delta*>(normed), rows, lanes);
      });
    });
  });
}

extern "C" int mm_rec_cuda_add_rms_norm_backward(const void* dtotal, const void* dn, int64_t delta_dtype,
                                                 const void* total, int64_t x_dtype, void* dx, void* ddelta,
                                                 int64_t count, int64_t size, void* stream) {
  using namespace mm_rec;
  const Rows rows = contiguous(count, size);
  return by_vector(rows, [&](auto vector) {
    return by_type(x_dtype, [&](auto x_type) {
      return by_type(delta_dtype, [&](auto delta_type) {
        using X = decltype(x_type);
        using Delta = decltype(delta_type);
        const int lanes = lanes_a_row(rows.size, vector);
        return launch(add_rms_norm_backward_kernel<vector, X, Delta>, grid(rows, lanes), dim3(kThreads), 0, stream,
                      static_cast<const X*>(dtotal), static_cast<const Delta*>(dn), static_cast<const X*>(total),
                      static_cast<X*>(dx), static_cast<Delta*>(ddelta), rows, lanes);
      });
    });
  });
}

extern "C" int mm_rec_cuda_readout_forward(const float* h, const void* r, int64_t r_dtype, int64_t r_stride, void* y,
                                           int64_t tokens, int64_t heads, int64_t size, void* stream) {
  using namespace mm_rec;
  const Rows rows{tokens * heads, static_cast<int>(size), static_cast<int>(heads), r_stride, size};
  return by_vector(rows, [&](auto vector) {
    return by_type(r_dtype, [&](auto r_type) {
      using R = decltype(r_type);
      const int lanes = lanes_a_row(rows.size, vector);
      return launch(readout_kernel<vector, R>, grid(rows, lanes), dim3(kThreads), 0, stream, h,
                    static_cast<const R*>(r), static_cast<R*>(y), rows, lanes);
    });
  });
}

extern "C" int mm_rec_cuda_readout_backward(const void* dy, const float* h, const void* r, int64_t r_dtype,
                                            int64_t r_stride, float* dh, void* dr, int64_t dr_stride, int64_t tokens,
                                            int64_t heads, int64_t size, void* stream) {
  using namespace mm_rec;
  const Rows rows{tokens * heads, static_cast<int>(size), static_cast<int>(heads), r_stride, size};
  const Rows dr_rows{tokens * heads, static_cast<int>(size), static_cast<int>(heads), dr_stride, size};
  return by_vector(rows, [&](auto vector) {
    return by_type(r_dtype, [&](auto r_type) {
      using R = decltype(r_type);
      const int lanes = lanes_a_row(rows.size, vector);
      return launch(readout_backward_kernel<vector, R>, grid(rows, lanes), dim3(kThreads), 0, stream,
                    static_cast<const R*>(dy), h, static_cast<const R*>(r), dh, static_cast<R*>(dr), rows, dr_rows, lanes);
    });
  });
}
