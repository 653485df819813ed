// The host code of mamba-ssm's and causal-conv1d's extensions for CPU tensors: their own sources, with a plain loop in
// place of each launch. A loop reads and writes through the pointers and strides that the host code fills in, as the
// kernel does, and refuses addresses from which the kernel could not load 16 bytes at once.

#include <ATen/Context.h>
#include <c10/core/DeviceGuard.h>
#include <torch/extension.h>

#include <c10/cuda/CUDAGuard.h>

#include <cmath>
#include <initializer_list>
#include <utility>
#include <vector>

#define is_cuda is_cpu  // from here on: what the host code asks of every tensor

#define TORCH_EXTENSION_NAME selective_scan_cuda
#include "csrc/selective_scan/selective_scan.cpp"
#undef TORCH_EXTENSION_NAME

#undef CHECK_SHAPE
#undef DISPATCH_ITYPE_FLOAT_AND_HALF_AND_BF16
#undef DISPATCH_WTYPE_FLOAT_AND_HALF_AND_BF16
#define TORCH_EXTENSION_NAME causal_conv1d_cuda
#include "csrc/causal_conv1d.cpp"
#undef TORCH_EXTENSION_NAME

namespace {

using Axes = std::initializer_list<std::pair<size_t, size_t>>;  // size and stride

// As a GPU: an access of 16 bytes at another address is an error.
template <typename T>
void check_rows(const char *name, const void *address, Axes axes) {
    TORCH_CHECK(reinterpret_cast<uintptr_t>(address) % 16 == 0, "misaligned address: ", name);
    for (auto [size, stride] : axes)
        TORCH_CHECK(size < 2 || stride * sizeof(T) % 16 == 0, "misaligned address: a row of ", name);
}

float sigmoid(float x) { return 1.f / (1.f + std::exp(-x)); }
float softplus(float x) { return x <= 20.f ? std::log1p(std::exp(x)) : x; }

// ---------------------------------------------------------------------------------------------------- selective scan
// Lengths that fill all threads of a block are loaded 16 bytes at a time.
bool is_even(int length) {
    const int block = length <= 128 ? 128 : length <= 256 ? 256 : length <= 512 ? 512 : length <= 1024 ? 1024 : 2048;
    return length % block == 0;
}

template <typename T>
void check_scan(const SSMParamsBase &p) {
    TORCH_CHECK(p.is_variable_B && p.is_variable_C, "not called so");
    if (!is_even(p.seqlen)) return;
    const size_t batch = p.batch, dim = p.dim, order = p.dstate, groups = p.n_groups;
    check_rows<T>("u", p.u_ptr, {{batch, p.u_batch_stride}, {dim, p.u_d_stride}});
    check_rows<T>("delta", p.delta_ptr, {{batch, p.delta_batch_stride}, {dim, p.delta_d_stride}});
    check_rows<T>("out", p.out_ptr, {{batch, p.out_batch_stride}, {dim, p.out_d_stride}});
    check_rows<T>("B", p.B_ptr, {{batch, p.B_batch_stride}, {groups, p.B_group_stride}, {order, p.B_dstate_stride}});
    check_rows<T>("C", p.C_ptr, {{batch, p.C_batch_stride}, {groups, p.C_group_stride}, {order, p.C_dstate_stride}});
    if (p.z_ptr) check_rows<T>("z", p.z_ptr, {{batch, p.z_batch_stride}, {dim, p.z_d_stride}});
    if (p.out_z_ptr) check_rows<T>("out_z", p.out_z_ptr, {{batch, p.out_z_batch_stride}, {dim, p.out_z_d_stride}});
}

// One channel of one sequence.
template <typename T>
struct Channel {
    Channel(const SSMParamsBase &p, int b, int d)
        : p(p),
          u(static_cast<T *>(p.u_ptr) + b * p.u_batch_stride + d * p.u_d_stride),
          delta(static_cast<T *>(p.delta_ptr) + b * p.delta_batch_stride + d * p.delta_d_stride),
          z(p.z_ptr ? static_cast<T *>(p.z_ptr) + b * p.z_batch_stride + d * p.z_d_stride : nullptr),
          A(static_cast<float *>(p.A_ptr) + d * p.A_d_stride),
          B(static_cast<T *>(p.B_ptr) + b * p.B_batch_stride + d / p.dim_ngroups_ratio * p.B_group_stride),
          C(static_cast<T *>(p.C_ptr) + b * p.C_batch_stride + d / p.dim_ngroups_ratio * p.C_group_stride),
          skip(p.D_ptr ? static_cast<float *>(p.D_ptr)[d] : 0.f),
          bias(p.delta_bias_ptr ? static_cast<float *>(p.delta_bias_ptr)[d] : 0.f) {}

    float raw(int t) const { return float(delta[t]) + bias; }
    float step(int t) const { return p.delta_softplus ? softplus(raw(t)) : raw(t); }
    float decay(int t, int n) const { return std::exp(step(t) * A[n * p.A_dstate_stride]); }
    float b(int t, int n) const { return B[n * p.B_dstate_stride + t]; }
    float c(int t, int n) const { return C[n * p.C_dstate_stride + t]; }

    const SSMParamsBase &p;
    const T *u, *delta, *z;
    const float *A;
    const T *B, *C;
    float skip, bias;
};

}  // namespace

template <typename T, typename weight_t>
void selective_scan_fwd_cuda(SSMParamsBase &p, cudaStream_t) {
    TORCH_CHECK((std::is_same_v<weight_t, float>), "not called with complex weights");
    check_scan<T>(p);
    for (int b = 0; b < p.batch; ++b)
        for (int d = 0; d < p.dim; ++d) {
            const Channel<T> row(p, b, d);
            T *out = static_cast<T *>(p.out_ptr) + b * p.out_batch_stride + d * p.out_d_stride;
            T *out_z = static_cast<T *>(p.out_z_ptr) + b * p.out_z_batch_stride + d * p.out_z_d_stride;
            float *kept = static_cast<float *>(p.x_ptr) + (size_t(b) * p.dim + d) * p.n_chunks * p.dstate * 2;
            std::vector<float> h(p.dstate, 0.f);
            for (int t = 0; t < p.seqlen; ++t) {
                const float u = row.u[t];
                float y = row.skip * u;
                for (int n = 0; n < p.dstate; ++n) {
                    h[n] = row.decay(t, n) * h[n] + row.step(t) * row.b(t, n) * u;
                    y += h[n] * row.c(t, n);
                    kept[(t / 2048 * p.dstate + n) * 2 + 1] = h[n];
                }
                out[t] = y;
                if (row.z) out_z[t] = y * float(row.z[t]) * sigmoid(row.z[t]);
            }
        }
}

template <typename T, typename weight_t>
void selective_scan_bwd_cuda(SSMParamsBwd &p, cudaStream_t) {
    TORCH_CHECK((std::is_same_v<weight_t, float>), "not called with complex weights");
    check_scan<T>(p);
    if (is_even(p.seqlen)) {
        const size_t batch = p.batch, dim = p.dim;
        check_rows<T>("dout", p.dout_ptr, {{batch, p.dout_batch_stride}, {dim, p.dout_d_stride}});
        check_rows<T>("du", p.du_ptr, {{batch, p.du_batch_stride}, {dim, p.du_d_stride}});
        check_rows<T>("ddelta", p.ddelta_ptr, {{batch, p.ddelta_batch_stride}, {dim, p.ddelta_d_stride}});
        if (p.dz_ptr) check_rows<T>("dz", p.dz_ptr, {{batch, p.dz_batch_stride}, {dim, p.dz_d_stride}});
    }
    for (int b = 0; b < p.batch; ++b)
        for (int d = 0; d < p.dim; ++d) {
            const Channel<T> row(p, b, d);
            const int group = d / p.dim_ngroups_ratio;
            const T *dout = static_cast<T *>(p.dout_ptr) + b * p.dout_batch_stride + d * p.dout_d_stride;
            const T *out = static_cast<T *>(p.out_ptr) + b * p.out_batch_stride + d * p.out_d_stride;
            T *du = static_cast<T *>(p.du_ptr) + b * p.du_batch_stride + d * p.du_d_stride;
            T *ddelta = static_cast<T *>(p.ddelta_ptr) + b * p.ddelta_batch_stride + d * p.ddelta_d_stride;
            T *dz = static_cast<T *>(p.dz_ptr) + b * p.dz_batch_stride + d * p.dz_d_stride;
            T *out_z = static_cast<T *>(p.out_z_ptr) + b * p.out_z_batch_stride + d * p.out_z_d_stride;
            float *dA = static_cast<float *>(p.dA_ptr) + d * p.dA_d_stride;
            float *dB = static_cast<float *>(p.dB_ptr) + b * p.dB_batch_stride + group * p.dB_group_stride;
            float *dC = static_cast<float *>(p.dC_ptr) + b * p.dC_batch_stride + group * p.dC_group_stride;
            std::vector<float> h((p.seqlen + 1) * size_t(p.dstate), 0.f), carried(p.dstate, 0.f);
            for (int t = 0; t < p.seqlen; ++t)
                for (int n = 0; n < p.dstate; ++n)
                    h[(t + 1) * p.dstate + n] =
                        row.decay(t, n) * h[t * p.dstate + n] + row.step(t) * row.b(t, n) * float(row.u[t]);
            for (int t = p.seqlen - 1; t >= 0; --t) {
                const float u = row.u[t], step = row.step(t);
                float dy = dout[t];
                if (row.z) {
                    const float z = row.z[t], gate = sigmoid(z), y = out[t];
                    dz[t] = dy * y * gate * (1.f + z * (1.f - gate));
                    dy *= z * gate;
                    if (p.out_z_ptr) out_z[t] = y * z * gate;
                }
                float u_sum = dy * row.skip, step_sum = 0.f;
                for (int n = 0; n < p.dstate; ++n) {
                    const float before = h[t * p.dstate + n], decay = row.decay(t, n), rate = row.A[n * p.A_dstate_stride];
                    const float dh = dy * row.c(t, n) + carried[n];
                    dC[n * p.dC_dstate_stride + t] += dy * h[(t + 1) * p.dstate + n];
                    dB[n * p.dB_dstate_stride + t] += dh * step * u;
                    dA[n * p.dA_dstate_stride] += dh * before * decay * step;
                    u_sum += dh * step * row.b(t, n);
                    step_sum += dh * (before * decay * rate + row.b(t, n) * u);
                    carried[n] = dh * decay;
                }
                if (p.delta_softplus && row.raw(t) <= 20.f) step_sum *= sigmoid(row.raw(t));
                if (p.dD_ptr) static_cast<float *>(p.dD_ptr)[d] += dy * u;
                if (p.ddelta_bias_ptr) static_cast<float *>(p.ddelta_bias_ptr)[d] += step_sum;
                du[t] = u_sum;
                ddelta[t] = step_sum;
            }
        }
}

// ------------------------------------------------------------------------------------------------ causal convolution
namespace {

template <typename weight_t>
struct Filter {
    Filter(const ConvParamsBase &p, int c)
        : taps(static_cast<weight_t *>(p.weight_ptr) + c * p.weight_c_stride),
          stride(p.weight_width_stride),
          bias(p.bias_ptr ? float(static_cast<weight_t *>(p.bias_ptr)[c]) : 0.f) {}
    float operator[](int k) const { return taps[k * stride]; }

    const weight_t *taps;
    size_t stride;
    float bias;
};

template <typename T>
void check_conv(const ConvParamsBase &p, bool channels_last) {
    TORCH_CHECK(!p.seq_idx_ptr && !p.initial_states_ptr && !p.final_states_ptr, "not called so");
    const size_t batch = p.batch, dim = p.dim, length = p.seqlen;
    if (channels_last) {
        check_rows<T>("x", p.x_ptr, {{batch, p.x_batch_stride}, {length, p.x_l_stride}});
        check_rows<T>("out", p.out_ptr, {{batch, p.out_batch_stride}, {length, p.out_l_stride}});
    } else if (length % (16 / sizeof(T)) == 0) {
        check_rows<T>("x", p.x_ptr, {{batch, p.x_batch_stride}, {dim, p.x_c_stride}});
        check_rows<T>("out", p.out_ptr, {{batch, p.out_batch_stride}, {dim, p.out_c_stride}});
    }
}

// The kernels take the stride of the layout's inner axis for 1, whatever it is.
template <typename T, typename weight_t>
void convolve(ConvParamsBase &p, bool channels_last) {
    check_conv<T>(p, channels_last);
    const size_t x_c = channels_last ? 1 : p.x_c_stride, x_t = channels_last ? p.x_l_stride : 1;
    const size_t out_c = channels_last ? 1 : p.out_c_stride, out_t = channels_last ? p.out_l_stride : 1;
    for (int b = 0; b < p.batch; ++b)
        for (int c = 0; c < p.dim; ++c) {
            const Filter<weight_t> weight(p, c);
            const T *x = static_cast<T *>(p.x_ptr) + size_t(b) * p.x_batch_stride + c * x_c;
            T *out = static_cast<T *>(p.out_ptr) + size_t(b) * p.out_batch_stride + c * out_c;
            for (int t = 0; t < p.seqlen; ++t) {
                float y = weight.bias;
                for (int k = 0; k < p.width; ++k)
                    if (const int s = t - p.width + 1 + k; s >= 0) y += weight[k] * float(x[s * x_t]);
                out[t * out_t] = p.silu_activation ? y * sigmoid(y) : y;
            }
        }
}

template <typename T, typename weight_t>
void convolve_backward(ConvParamsBwd &p, bool channels_last) {
    TORCH_CHECK(!p.dinitial_states_ptr && !p.dfinal_states_ptr, "not called so");
    check_conv<T>(p, channels_last);  // its output is the gradient here
    const size_t batch = p.batch, dim = p.dim, length = p.seqlen;
    if (channels_last)
        check_rows<T>("dx", p.dx_ptr, {{batch, p.dx_batch_stride}, {length, p.dx_l_stride}});
    else if (length % (16 / sizeof(T)) == 0)
        check_rows<T>("dx", p.dx_ptr, {{batch, p.dx_batch_stride}, {dim, p.dx_c_stride}});
    const size_t x_c = channels_last ? 1 : p.x_c_stride, x_t = channels_last ? p.x_l_stride : 1;
    const size_t dout_c = channels_last ? 1 : p.dout_c_stride, dout_t = channels_last ? p.dout_l_stride : 1;
    const size_t dx_c = channels_last ? 1 : p.dx_c_stride, dx_t = channels_last ? p.dx_l_stride : 1;
    for (int b = 0; b < p.batch; ++b)
        for (int c = 0; c < p.dim; ++c) {
            const Filter<weight_t> weight(p, c);
            const T *x = static_cast<T *>(p.x_ptr) + size_t(b) * p.x_batch_stride + c * x_c;
            const T *dout = static_cast<T *>(p.dout_ptr) + size_t(b) * p.dout_batch_stride + c * dout_c;
            T *dx = static_cast<T *>(p.dx_ptr) + size_t(b) * p.dx_batch_stride + c * dx_c;
            std::vector<float> sums(p.seqlen, 0.f), taps(p.width, 0.f);
            float bias_sum = 0.f;
            for (int t = 0; t < p.seqlen; ++t) {
                float y = weight.bias, dy = dout[t * dout_t];
                for (int k = 0; k < p.width; ++k)
                    if (const int s = t - p.width + 1 + k; s >= 0) y += weight[k] * float(x[s * x_t]);
                if (p.silu_activation) dy *= sigmoid(y) * (1.f + y * (1.f - sigmoid(y)));
                bias_sum += dy;
                for (int k = 0; k < p.width; ++k)
                    if (const int s = t - p.width + 1 + k; s >= 0) {
                        sums[s] += weight[k] * dy;
                        taps[k] += float(x[s * x_t]) * dy;
                    }
            }
            for (int t = 0; t < p.seqlen; ++t) dx[t * dx_t] = sums[t];
            if (p.deterministic) {
                float *kept = static_cast<float *>(p.dweight_workspace_ptr) + size_t(b) * p.dweight_workspace_batch_stride;
                for (int k = 0; k < p.width; ++k) kept[c * p.dweight_workspace_dim_stride + k] = taps[k];
                if (p.dbias_ptr)
                    static_cast<float *>(p.dbias_workspace_ptr)[size_t(b) * p.dbias_workspace_batch_stride + c] = bias_sum;
            } else {
                float *dweight = static_cast<float *>(p.dweight_ptr) + c * p.dweight_c_stride;
                for (int k = 0; k < p.width; ++k) dweight[k * p.dweight_width_stride] += taps[k];
                if (p.dbias_ptr) static_cast<float *>(p.dbias_ptr)[c] += bias_sum;
            }
        }
}

}  // namespace

template <typename T, typename weight_t>
void causal_conv1d_fwd_cuda(ConvParamsBase &p, cudaStream_t) {
    convolve<T, weight_t>(p, false);
}

template <typename T, typename weight_t>
void causal_conv1d_channellast_fwd_cuda(ConvParamsBase &p, cudaStream_t) {
    convolve<T, weight_t>(p, true);
}

template <typename T, typename weight_t>
void causal_conv1d_bwd_cuda(ConvParamsBwd &p, cudaStream_t) {
    convolve_backward<T, weight_t>(p, false);
}

template <typename T, typename weight_t>
void causal_conv1d_channellast_bwd_cuda(ConvParamsBwd &p, cudaStream_t) {
    convolve_backward<T, weight_t>(p, true);
}

template <typename T, typename weight_t>
void causal_conv1d_update_cuda(ConvParamsBase &p, cudaStream_t) {
    TORCH_CHECK(!p.cache_seqlens && !p.conv_state_indices_ptr && p.conv_state_len == p.width - 1, "not called so");
    for (int b = 0; b < p.batch; ++b)
        for (int c = 0; c < p.dim; ++c) {
            const Filter<weight_t> weight(p, c);
            const T *x = static_cast<T *>(p.x_ptr) + size_t(b) * p.x_batch_stride + c * p.x_c_stride;
            T *out = static_cast<T *>(p.out_ptr) + size_t(b) * p.out_batch_stride + c * p.out_c_stride;
            T *state = static_cast<T *>(p.conv_state_ptr) + size_t(b) * p.conv_state_batch_stride + c * p.conv_state_c_stride;
            for (int t = 0; t < p.seqlen; ++t) {
                const T newest = x[t * p.x_l_stride];
                float y = weight.bias + weight[p.width - 1] * float(newest);
                for (int k = 0; k < p.width - 1; ++k) {
                    y += weight[k] * float(state[k * p.conv_state_l_stride]);
                    state[k * p.conv_state_l_stride] = k < p.width - 2 ? state[(k + 1) * p.conv_state_l_stride] : newest;
                }
                out[t * p.out_l_stride] = p.silu_activation ? y * sigmoid(y) : y;
            }
        }
}
