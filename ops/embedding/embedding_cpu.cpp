// Bound by memory: every element is read once and written once.
#include <cstring>

#include "kestrel/cpu/convert.h"
#include "kestrel/cpu/parallel.h"
#include "ops/embedding/args.h"

namespace KESTREL_CPU {

void embedding(const EmbeddingArgs& args) {
  const int64_t width = size_of(args.table.dtype);
  dispatch<int32_t, int64_t>(args.ids.dtype, [&]<class Id>() {
    parallel_for(args.out_rows.count, 1 + (1 << 20) / args.row_bytes, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        const int64_t id = args.ids.ptr<Id>()[args.id_rows.offset(row)];
        std::memcpy(args.out.ptr<char>() + args.out_rows.offset(row) * width,
                    args.table.ptr<char>() + id * args.table.stride[0] * width, static_cast<size_t>(args.row_bytes));
      }
    });
  });
}

}  // namespace KESTREL_CPU
