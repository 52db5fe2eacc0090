// Runs calls of the kernels, read from standard input, and writes their outputs to standard output.
//
// A call is 16 numbers in float64, below, then its inputs. Every tensor has a buffer of its own, as
// long as it is, so that the address sanitizer sees an access beside it.

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace {

// `bytes` bytes, `offset` bytes behind a 16-byte boundary.
class Buffer {
 public:
  Buffer(size_t bytes, size_t offset) : bytes_(bytes), offset_(offset) {
    if (posix_memalign(&start_, 16, offset + bytes)) std::abort();
    std::memset(start_, 0xff, offset + bytes);  // NaN
  }
  ~Buffer() { std::free(start_); }
  Buffer(const Buffer&) = delete;

  char* data() const { return static_cast<char*>(start_) + offset_; }
  void read() const {
    if (std::fread(data(), 1, bytes_, stdin) != bytes_) std::abort();
  }
  void write() const { std::fwrite(data(), 1, bytes_, stdout); }

 private:
  void* start_;
  size_t bytes_, offset_;
};

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "a launch failed\n");
  std::exit(1);
}

}  // namespace

int main() {
  for (double call[16]; std::fread(call, sizeof(call), 1, stdin) == 1;) {
    const auto dtype = static_cast<pfgm::DType>(static_cast<int>(call[1]));
    const size_t item = dtype < pfgm::DType::float32 ? 2 : dtype == pfgm::DType::float32 ? 4 : 8;
    const auto integer = [&](int i) { return static_cast<long long>(call[i]); };

    if (call[0] == 0) {  // upfirdn2d: dtype, planes, then pairs as in Resampling
      pfgm::Resampling r;
      r.planes = integer(2);
      int* pairs[] = {r.in, r.out, r.taps, r.up, r.down, r.pad};
      for (int i = 0; i < 12; ++i) pairs[i / 2][i % 2] = static_cast<int>(call[3 + i]);
      const Buffer x(item * r.planes * r.in[0] * r.in[1], item * integer(15));
      const Buffer filter((item == 8 ? 8 : 4) * r.taps[0] * r.taps[1], 0);
      const Buffer out(item * r.planes * r.out[0] * r.out[1], item * integer(15));
      x.read();
      filter.read();
      check(pfgm::upfirdn2d(dtype, x.data(), filter.data(), out.data(), r, nullptr));
      out.write();
    } else {  // fused_leaky_relu: dtype, batch, channels, inner, slope, scale, with grad, offsets
      const long long size = integer(2) * integer(3) * integer(4);
      const Buffer x(item * size, item * integer(8)), bias(item * integer(3), item);
      const Buffer grad(item * size, item * integer(9)), out(item * size, item * integer(10));
      x.read();
      bias.read();
      if (call[7]) grad.read();
      check(pfgm::fused_leaky_relu(dtype, x.data(), bias.data(), call[7] ? grad.data() : nullptr,
                                   out.data(), size, integer(3), integer(4), call[5], call[6],
                                   nullptr));
      out.write();
    }
  }
}
