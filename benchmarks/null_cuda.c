/* A CUDA that computes nothing: it allocates, copies and counts, so that ONNX Runtime's CUDA provider opens sessions
 * and runs them on a machine without a card. Every kernel launch succeeds and changes no memory. What is real: which
 * node goes to which provider, what is allocated when, and every byte that is copied to the card or back.
 *
 * One source, built once for each library that the provider links (see null_cuda.py), with CUDA 13's symbol versions
 * and structure layouts. The layouts are offsets, so that no header of CUDA is needed. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#ifdef CUDART

enum { HOST_TO_DEVICE = 1, DEVICE_TO_HOST = 2, DEVICE_TO_DEVICE = 3, DEFAULT = 4 };
enum { OUT_OF_MEMORY = 2 };
enum { HANDLES = 1 << 16 };

struct counters {
    uint64_t allocated, peak, limit;
    uint64_t to_device, to_host, within_device;
    uint64_t launches;
    uint64_t captured_copies, captured_allocations; /* bytes and blocks that no captured graph may hold */
};
static struct counters count = {.limit = UINT64_MAX};
static struct block { char *start; size_t size; } blocks[HANDLES];
static int used;
static int capturing; /* whether launches are recorded and not run */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char handle[64]; /* what every stream, event, graph and the like is */

void null_cuda_read(struct counters *out) { pthread_mutex_lock(&lock); *out = count; pthread_mutex_unlock(&lock); }
void null_cuda_reset(void) {
    pthread_mutex_lock(&lock);
    count.to_device = count.to_host = count.within_device = count.launches = 0;
    count.captured_copies = count.captured_allocations = 0;
    count.peak = count.allocated;
    pthread_mutex_unlock(&lock);
}
void null_cuda_limit(uint64_t bytes) { count.limit = bytes; }

static int find(const void *pointer) {
    for (int i = used - 1; i >= 0; i--)
        if ((char *)pointer >= blocks[i].start && (char *)pointer < blocks[i].start + blocks[i].size) return i;
    return -1;
}

int cudaMalloc(void **out, size_t size) {
    /* Pages that nothing is copied to cost no memory of the host. */
    size_t whole = size ? size : 1;
    pthread_mutex_lock(&lock);
    if (count.allocated + size > count.limit || used == HANDLES) { pthread_mutex_unlock(&lock); return OUT_OF_MEMORY; }
    char *memory = mmap(NULL, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) { pthread_mutex_unlock(&lock); return OUT_OF_MEMORY; }
    blocks[used++] = (struct block){memory, whole};
    count.allocated += whole;
    count.captured_allocations += capturing;
    if (count.allocated > count.peak) count.peak = count.allocated;
    pthread_mutex_unlock(&lock);
    *out = memory;
    return 0;
}
int cudaFree(void *pointer) {
    pthread_mutex_lock(&lock);
    int i = pointer ? find(pointer) : -1;
    if (i >= 0) {
        munmap(blocks[i].start, blocks[i].size);
        count.allocated -= blocks[i].size;
        blocks[i] = blocks[--used];
    }
    pthread_mutex_unlock(&lock);
    return 0;
}
int cudaMallocFromPoolAsync(void **out, size_t size, void *pool, void *stream) { return cudaMalloc(out, size); }
int cudaFreeAsync(void *pointer, void *stream) { return cudaFree(pointer); }
int cudaMallocHost(void **out, size_t size) { *out = calloc(1, size); return *out ? 0 : OUT_OF_MEMORY; }
int cudaHostAlloc(void **out, size_t size, unsigned flags) { return cudaMallocHost(out, size); }
int cudaFreeHost(void *pointer) { free(pointer); return 0; }
int cudaMemGetInfo(size_t *free_bytes, size_t *total) {
    *total = count.limit == UINT64_MAX ? 80ull << 30 : count.limit;
    *free_bytes = *total - count.allocated;
    return 0;
}

static int copy(void *to, const void *from, size_t size, int kind) {
    pthread_mutex_lock(&lock);
    if (kind == DEFAULT) {
        int there = find(to) >= 0, here = find(from) >= 0;
        kind = there && here ? DEVICE_TO_DEVICE : there ? HOST_TO_DEVICE : here ? DEVICE_TO_HOST : 0;
    }
    if (kind == HOST_TO_DEVICE) count.to_device += size;
    if (kind == DEVICE_TO_HOST) count.to_host += size;
    if (kind == DEVICE_TO_DEVICE) count.within_device += size;
    else if (capturing) count.captured_copies += size; /* when it is replayed, the host has other things there */
    pthread_mutex_unlock(&lock);
    /* One int32 is what a kernel counted, in NonZero; what lies there instead would be taken for a length. */
    if (kind == DEVICE_TO_HOST && size == 4) memset(to, 0, size);
    else memmove(to, from, size);
    return 0;
}
int cudaMemcpy(void *to, const void *from, size_t size, int kind) { return copy(to, from, size, kind); }
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) { return copy(to, from, size, kind); }
int cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height, int kind,
                      void *stream) {
    for (size_t row = 0; row < height; row++)
        copy((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width, kind);
    return 0;
}
int cudaMemcpyFromSymbol(void *to, const void *symbol, size_t size, size_t offset, int kind) { memset(to, 0, size); return 0; }
int cudaMemset(void *pointer, int value, size_t size) { memset(pointer, value, size); return 0; }
int cudaMemsetAsync(void *pointer, int value, size_t size, void *stream) { return cudaMemset(pointer, value, size); }

int cudaPointerGetAttributes(void *out, const void *pointer) {
    memset(out, 0, 88);
    pthread_mutex_lock(&lock);
    if (find(pointer) >= 0) { *(int *)out = 2; ((const void **)out)[1] = pointer; } /* device memory */
    pthread_mutex_unlock(&lock);
    return 0;
}

/* An H100, as far as it is asked about. */
int cudaGetDeviceProperties(void *out, int device) {
    char *p = out;
    memset(p, 0, 1008);
    strcpy(p, "null CUDA");
    *(uint64_t *)(p + 288) = 80ull << 30; /* totalGlobalMem */
    *(uint64_t *)(p + 296) = 48 << 10;    /* sharedMemPerBlock */
    *(int *)(p + 304) = 65536;            /* regsPerBlock */
    *(int *)(p + 308) = 32;               /* warpSize */
    *(int *)(p + 320) = 1024;             /* maxThreadsPerBlock */
    for (int i = 0; i < 3; i++) ((int *)(p + 324))[i] = i == 2 ? 64 : 1024;
    for (int i = 0; i < 3; i++) ((int *)(p + 336))[i] = i ? 65535 : 2147483647;
    *(int *)(p + 360) = 9;                /* compute capability 9.0 */
    *(int *)(p + 384) = 132;              /* multiProcessorCount */
    *(int *)(p + 596) = 50 << 20;         /* l2CacheSize */
    *(int *)(p + 604) = 2048;             /* maxThreadsPerMultiProcessor */
    *(uint64_t *)(p + 624) = 228 << 10;   /* sharedMemPerMultiprocessor */
    *(int *)(p + 632) = 65536;            /* regsPerMultiprocessor */
    *(uint64_t *)(p + 672) = 227 << 10;   /* sharedMemPerBlockOptin */
    return 0;
}
int cudaDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) {
    case 1: *value = 1024; break;       /* threads of a block */
    case 5: *value = 2147483647; break; /* blocks of a grid along x */
    case 10: *value = 32; break;        /* threads of a warp */
    case 12: *value = 65536; break;     /* registers of a block */
    case 16: *value = 132; break;       /* multiprocessors */
    case 75: *value = 9; break;         /* compute capability */
    case 81: *value = 228 << 10; break; /* shared memory of a multiprocessor */
    case 97: *value = 227 << 10; break; /* shared memory of a block, on request */
    default: *value = 0;
    }
    return 0;
}
int cudaGetDeviceCount(int *n) { *n = 1; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaSetDevice(int device) { return 0; }
int cudaDeviceSynchronize(void) { return 0; }
int cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
int cudaRuntimeGetVersion(int *version) { *version = 13000; return 0; }
static int nothing(void) { return 0; }
int cudaGetDriverEntryPointByVersion(const char *name, void **out, unsigned version, uint64_t flags, int *status) {
    *out = (void *)nothing;
    if (status) *status = 0;
    return 0;
}
const char *cudaGetErrorName(int error) { return error == OUT_OF_MEMORY ? "cudaErrorMemoryAllocation" : "cudaErrorUnknown"; }
const char *cudaGetErrorString(int error) { return error == OUT_OF_MEMORY ? "out of memory" : "unknown error"; }
int cudaGetLastError(void) { return 0; }
int cudaPeekAtLastError(void) { return 0; }

int cudaFuncGetAttributes(void *out, const void *function) {
    memset(out, 0, 144);
    *(int *)((char *)out + 24) = 1024; /* maxThreadsPerBlock */
    *(int *)((char *)out + 28) = 32;   /* numRegs */
    *(int *)((char *)out + 32) = 90;   /* ptxVersion */
    *(int *)((char *)out + 36) = 90;   /* binaryVersion */
    *(int *)((char *)out + 44) = 227 << 10;
    return 0;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int threads, size_t shared, unsigned flags) {
    *n = 1;
    return 0;
}
static int launch(void) { if (!capturing) __atomic_add_fetch(&count.launches, 1, __ATOMIC_RELAXED); return 0; }
#define LAUNCHES(name) int name(void) { return launch(); }
LAUNCHES(cudaLaunchKernel) LAUNCHES(__cudaLaunchKernel) LAUNCHES(cudaLaunchKernelExC) LAUNCHES(cudaLaunchCooperativeKernel)
LAUNCHES(cudaGraphLaunch)
int cudaLaunchHostFunc(void *stream, void (*function)(void *), void *data) { function(data); return 0; }

#define GIVES_HANDLE(name) int name(void **out) { *out = handle; return 0; }
GIVES_HANDLE(cudaStreamCreate) GIVES_HANDLE(cudaStreamCreateWithFlags) GIVES_HANDLE(cudaEventCreate)
GIVES_HANDLE(cudaEventCreateWithFlags) GIVES_HANDLE(cudaMemPoolCreate) GIVES_HANDLE(cudaGraphInstantiate)
GIVES_HANDLE(cudaLibraryLoadData) GIVES_HANDLE(cudaLibraryGetKernel) GIVES_HANDLE(__cudaGetKernel)
int cudaStreamBeginCapture(void *stream, int mode) { capturing = 1; return 0; }
int cudaStreamEndCapture(void *stream, void **graph) { capturing = 0; *graph = handle; return 0; }
int cudaStreamIsCapturing(void *stream, int *status) { *status = capturing; return 0; }
int cudaEventElapsedTime(float *milliseconds, void *start, void *end) { *milliseconds = 0; return 0; }
int cudaMemPoolGetAttribute(void *pool, int attribute, void *value) { *(uint64_t *)value = 0; return 0; }

#define SUCCEEDS(name) int name(void) { return 0; }
SUCCEEDS(cudaEventDestroy) SUCCEEDS(cudaEventRecord) SUCCEEDS(cudaEventRecordWithFlags) SUCCEEDS(cudaEventSynchronize)
SUCCEEDS(cudaFuncSetAttribute) SUCCEEDS(cudaGraphDestroy) SUCCEEDS(cudaGraphExecDestroy) SUCCEEDS(cudaLibraryUnload)
SUCCEEDS(cudaKernelSetAttributeForDevice) SUCCEEDS(cudaMemPoolDestroy) SUCCEEDS(cudaMemPoolSetAttribute)
SUCCEEDS(cudaMemPoolTrimTo) SUCCEEDS(cudaStreamDestroy) SUCCEEDS(cudaStreamSynchronize)
SUCCEEDS(cudaStreamWaitEvent)

void **__cudaRegisterFatBinary(void *binary) { static void *registered[1]; return registered; }
SUCCEEDS(__cudaRegisterFatBinaryEnd) SUCCEEDS(__cudaRegisterFunction) SUCCEEDS(__cudaRegisterVar)
SUCCEEDS(__cudaUnregisterFatBinary) SUCCEEDS(__cudaPushCallConfiguration)
int __cudaPopCallConfiguration(void *grid, void *block, size_t *shared, void **stream) {
    *shared = 0;
    *stream = NULL;
    for (int i = 0; i < 3; i++) ((unsigned *)grid)[i] = ((unsigned *)block)[i] = 1;
    return 0;
}

#elif defined(CUBLAS) || defined(CUBLASLT)

static char handle[64];
#define GIVES_HANDLE(name) int name(void **out) { *out = handle; return 0; }
#define SUCCEEDS(name) int name(void) { return 0; }

#ifdef CUBLAS
GIVES_HANDLE(cublasCreate_v2)
SUCCEEDS(cublasDestroy_v2) SUCCEEDS(cublasDgeam) SUCCEEDS(cublasDgemmBatched) SUCCEEDS(cublasDgemmStridedBatched)
SUCCEEDS(cublasDgemm_v2) SUCCEEDS(cublasDgetrfBatched) SUCCEEDS(cublasDgetriBatched) SUCCEEDS(cublasGemmBatchedEx)
SUCCEEDS(cublasGemmEx) SUCCEEDS(cublasGemmStridedBatchedEx) SUCCEEDS(cublasScopy_v2) SUCCEEDS(cublasSetMathMode)
SUCCEEDS(cublasSetStream_v2) SUCCEEDS(cublasSgeam) SUCCEEDS(cublasSgemmBatched) SUCCEEDS(cublasSgemmStridedBatched)
SUCCEEDS(cublasSgemm_v2) SUCCEEDS(cublasSgetrfBatched) SUCCEEDS(cublasSgetriBatched) SUCCEEDS(cublasSscal_v2)
int cublasGetMathMode(void *cublas, int *mode) { *mode = 0; return 0; }
const char *cublasGetStatusName(int status) { return "CUBLAS_STATUS"; }
const char *cublasGetStatusString(int status) { return "a status"; }
#else
GIVES_HANDLE(cublasLtCreate) GIVES_HANDLE(cublasLtMatmulDescCreate) GIVES_HANDLE(cublasLtMatmulPreferenceCreate)
GIVES_HANDLE(cublasLtMatrixLayoutCreate) GIVES_HANDLE(cublasLtMatrixTransformDescCreate)
SUCCEEDS(cublasLtDestroy) SUCCEEDS(cublasLtMatmul) SUCCEEDS(cublasLtMatmulAlgoConfigSetAttribute)
SUCCEEDS(cublasLtMatmulAlgoInit) SUCCEEDS(cublasLtMatmulDescDestroy) SUCCEEDS(cublasLtMatmulDescSetAttribute)
SUCCEEDS(cublasLtMatmulPreferenceDestroy) SUCCEEDS(cublasLtMatmulPreferenceSetAttribute)
SUCCEEDS(cublasLtMatrixLayoutDestroy) SUCCEEDS(cublasLtMatrixLayoutSetAttribute) SUCCEEDS(cublasLtMatrixTransform)
SUCCEEDS(cublasLtMatrixTransformDescDestroy) SUCCEEDS(cublasLtMatrixTransformDescSetAttribute)
int cublasLtMatmulAlgoGetHeuristic(void *lt, void *operation, void *a, void *b, void *c, void *d, void *preference,
                                   int requested, void *results, int *found) {
    memset(results, 0, 64); /* one algorithm, without workspace */
    *found = 1;
    return 0;
}
#endif

#elif defined(CUDNN)

static char handle[64];
#define GIVES_HANDLE(name) int name(void **out) { *out = handle; return 0; }
#define SUCCEEDS(name) int name(void) { return 0; }
size_t cudnnGetVersion(void) { return 91000; }
const char *cudnnGetErrorString(int status) { return "a status"; }
void cudnnGetLastErrorString(char *message, size_t size) { if (size) *message = 0; }
int cudnnBackendCreateDescriptor(int type, void **out) { *out = handle; return 0; }
int cudnnBackendGetAttribute(void *descriptor, int name, int type, int64_t requested, int64_t *count, void *values) {
    /* One engine, one plan; no notes (types 11 and 19), no knobs (name 302), of which counts are asked likewise. */
    if (count) *count = type != 11 && type != 19 && name != 302;
    if (values && type == 3) *(int64_t *)values = 0; /* no workspace, */
    if (values && type == 23) *(int *)values = 0;    /* no fallback needed */
    return 0;
}
int cudnnGetReductionWorkspaceSize(void *a, void *b, void *c, void *d, size_t *size) { *size = 0; return 0; }
int cudnnGetReductionIndicesSize(void *a, void *b, void *c, void *d, size_t *size) { *size = 0; return 0; }
int cudnnGetConvolutionForwardWorkspaceSize(void *a, void *b, void *c, void *d, void *e, int algorithm, size_t *size) {
    *size = 0;
    return 0;
}
int cudnnFindConvolutionForwardAlgorithmEx(void *a, void *b, void *c, void *d, void *e, void *f, void *g, void *h,
                                           int requested, int *found, void *results, void *workspace, size_t size) {
    memset(results, 0, 48);
    *found = 1;
    return 0;
}
int cudnnGetConvolutionForwardAlgorithm_v7(void *a, void *b, void *c, void *d, void *e, int requested, int *found,
                                           void *results) {
    memset(results, 0, 48);
    *found = 1;
    return 0;
}
GIVES_HANDLE(cudnnCreate) GIVES_HANDLE(cudnnCreateActivationDescriptor) GIVES_HANDLE(cudnnCreateConvolutionDescriptor)
GIVES_HANDLE(cudnnCreateDropoutDescriptor) GIVES_HANDLE(cudnnCreateFilterDescriptor) GIVES_HANDLE(cudnnCreateLRNDescriptor)
GIVES_HANDLE(cudnnCreatePoolingDescriptor) GIVES_HANDLE(cudnnCreateReduceTensorDescriptor)
GIVES_HANDLE(cudnnCreateTensorDescriptor)
SUCCEEDS(cudnnActivationForward) SUCCEEDS(cudnnAddTensor) SUCCEEDS(cudnnBackendDestroyDescriptor)
SUCCEEDS(cudnnBackendExecute) SUCCEEDS(cudnnBackendFinalize) SUCCEEDS(cudnnBackendSetAttribute)
SUCCEEDS(cudnnBatchNormalizationForwardInference) SUCCEEDS(cudnnConvolutionBiasActivationForward)
SUCCEEDS(cudnnConvolutionForward) SUCCEEDS(cudnnDeriveBNTensorDescriptor) SUCCEEDS(cudnnDestroy) SUCCEEDS(cudnnDestroyActivationDescriptor)
SUCCEEDS(cudnnDestroyConvolutionDescriptor) SUCCEEDS(cudnnDestroyDropoutDescriptor) SUCCEEDS(cudnnDestroyFilterDescriptor)
SUCCEEDS(cudnnDestroyLRNDescriptor) SUCCEEDS(cudnnDestroyPoolingDescriptor) SUCCEEDS(cudnnDestroyReduceTensorDescriptor)
SUCCEEDS(cudnnDestroyTensorDescriptor) SUCCEEDS(cudnnGetStream) SUCCEEDS(cudnnPoolingForward) SUCCEEDS(cudnnReduceTensor)
SUCCEEDS(cudnnSetActivationDescriptor) SUCCEEDS(cudnnSetConvolutionGroupCount) SUCCEEDS(cudnnSetConvolutionMathType)
SUCCEEDS(cudnnSetConvolutionNdDescriptor) SUCCEEDS(cudnnSetFilterNdDescriptor) SUCCEEDS(cudnnSetPoolingNdDescriptor)
SUCCEEDS(cudnnSetReduceTensorDescriptor) SUCCEEDS(cudnnSetStream) SUCCEEDS(cudnnSetTensorNdDescriptor)
SUCCEEDS(cudnnSoftmaxForward)

#else /* CURAND, CUDA: linked, and hardly called */
int cuTensorMapEncodeTiled(void) { return 0; }
#endif
