#include "ops/embedding/embedding.h"

#include "kestrel/contract.h"
#include "kestrel/cpu/target.h"
#include "kestrel/cuda.h"
#include "ops/embedding/args.h"

KESTREL_CPU_TWIN(embedding, void(const kestrel::EmbeddingArgs& args));

namespace kestrel {
namespace cuda {
void embedding(Stream stream, const EmbeddingArgs& args);
}

void embedding(Stream stream, Tensor out, Tensor table, Tensor ids) {
  Contract c("embedding");
  EmbeddingArgs args{out, table, ids, {}, {}, 0};
  c.in("table", table).rank(2, 2).last_contiguous();
  if (size_of(table.dtype) == 0)
    c.fail(ErrorKind::kTypeError, "table", "have elements of whole bytes", name_of(table.dtype));
  c.in("ids", ids).dtype({DType::kI32, DType::kI64}).rank(0, kMaxRank - 1);
  Tensor entries = ids;  // rows of one element
  entries.shape[entries.rank] = 1;
  entries.stride[entries.rank++] = 1;
  c.in("ids", entries).rows(&args.id_rows);
  Tensor expected = entries;
  expected.dtype = table.dtype;
  expected.shape[ids.rank] = table.size(1);
  c.out("out", out).like(expected).rows(&args.out_rows);
  c.indices(stream, "ids", ids, 0, table.size(0), false);
  args.row_bytes = table.size(1) * size_of(table.dtype);
  if (out.empty()) return;
  if (c.on_cpu()) return cpu::embedding(args);
  if constexpr (kHasCuda) {
    DeviceGuard guard(out.device);
    cuda::embedding(stream, args);
  }
}

}  // namespace kestrel
