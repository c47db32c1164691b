/* The skeleton of an iteration: what it computes and sends, without its values, for SimGrid's smpicc.
 *
 * skeleton PLAN reads the number of replicas, then a step a line, "ALGORITHM GROUP BYTES TIMES SECONDS", does all steps
 * twice, of which the first time is not counted, and prints on rank 0 the seconds of each step on the rank with most,
 * and last those of all of them on the rank with most.
 *
 * All calls block: pending ones are ten times dearer to simulate. Of equal collectives in a row only the first few are
 * done, and their seconds multiplied. The algorithms are those of collectives.py, by the same names.
 */

#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define STEPS 256
#define ENOUGH 2
#define SEGMENT 65536
#define SPEED 1e9 /* flop/s of a host of the platform */

struct step {
    char algorithm[32], group[16];
    int times;
    double bytes, seconds;
};

/* What a collective works with: a group, memory that all ranks share, and the largest power of two of the ranks. */
struct group {
    MPI_Comm comm;
    int rank, ranks, power;
    char *from, *to;
};

static void compute(double seconds) {
    if (seconds > 0.0)
        smpi_execute_flops(seconds * SPEED);
}

static void send(struct group *group, int rank, double bytes) {
    MPI_Send(group->from, (int)bytes, MPI_BYTE, rank, 0, group->comm);
}

static void receive(struct group *group, int rank, double bytes) {
    MPI_Recv(group->to, (int)bytes, MPI_BYTE, rank, 0, group->comm, MPI_STATUS_IGNORE);
}

static void swap(struct group *group, int to, int from, double bytes) {
    MPI_Sendrecv(group->from, (int)bytes, MPI_BYTE, to, 0, group->to, (int)bytes, MPI_BYTE, from, 0, group->comm,
                 MPI_STATUS_IGNORE);
}

static void shift(struct group *group, int distance, double bytes) {
    int ranks = group->ranks;
    swap(group, (group->rank + distance) % ranks, (group->rank + ranks - distance) % ranks, bytes);
}

/* Ranks beyond a power of two hand over to their left neighbours; whether this one has still a part in it. The new
 * number of each rank among the others is left in *number. */
static int fold(struct group *group, double bytes, int *number) {
    int rest = group->ranks - group->power;
    if (group->rank >= 2 * rest) {
        *number = group->rank - rest;
        return 1;
    }
    *number = group->rank / 2;
    if (group->rank % 2 == 1)
        send(group, group->rank - 1, bytes);
    else
        receive(group, group->rank + 1, bytes);
    return group->rank % 2 == 0;
}

static int place(struct group *group, int number) {
    int rest = group->ranks - group->power;
    return number < rest ? 2 * number : number + rest;
}

static void unfold(struct group *group, double bytes) {
    int rest = group->ranks - group->power;
    if (group->rank >= 2 * rest)
        return;
    if (group->rank % 2 == 1)
        receive(group, group->rank - 1, bytes);
    else
        send(group, group->rank + 1, bytes);
}

static void exchange(struct group *group, int number, int distance, double bytes) {
    int other = place(group, number ^ distance);
    swap(group, other, other, bytes);
}

static void doubling(struct group *group, double bytes) {
    int number;
    if (fold(group, bytes, &number))
        for (int distance = 1; distance < group->power; distance *= 2)
            exchange(group, number, distance, bytes);
    unfold(group, bytes);
}

static void rabenseifner(struct group *group, double bytes) {
    int number;
    if (fold(group, bytes, &number)) {
        for (int distance = 1; distance < group->power; distance *= 2)
            exchange(group, number, distance, bytes / (2 * distance));
        for (int distance = group->power / 2; distance > 0; distance /= 2)
            exchange(group, number, distance, bytes / (2 * distance));
    }
    unfold(group, bytes);
}

/* A tree whose parts may grow with the number of ranks below; towards rank 0, or from it. */
static void up(struct group *group, double bytes, double part) {
    for (int distance = 1; distance < group->ranks; distance *= 2) {
        int below = group->ranks - (group->rank - group->rank % (2 * distance) + distance);
        double size = bytes + part * (below < distance ? below : distance);
        if (group->rank % (2 * distance) == distance) {
            send(group, group->rank - distance, size);
            return;
        }
        if (group->rank + distance < group->ranks)
            receive(group, group->rank + distance, size);
    }
}

static void down(struct group *group, double bytes, double part) {
    int distance = 1;
    while (distance < group->ranks)
        distance *= 2;
    for (distance /= 2; distance > 0; distance /= 2) {
        if (group->rank % distance != 0)
            continue;
        int below = group->ranks - (group->rank - group->rank % (2 * distance) + distance);
        double size = bytes + part * (below < distance ? below : distance);
        if (group->rank % (2 * distance) == distance)
            receive(group, group->rank - distance, size);
        else if (group->rank + distance < group->ranks)
            send(group, group->rank + distance, size);
    }
}

static void halving_tree(struct group *group, double bytes) {
    int number;
    if (!fold(group, bytes, &number))
        return;
    for (int distance = 1; distance < group->power; distance *= 2)
        exchange(group, number, distance, bytes / (2 * distance));
    for (int distance = group->power / 2; distance > 0; distance /= 2) {
        /* Those above a distance have given all they had. */
        if (number >= 2 * distance)
            continue;
        if (number >= distance)
            send(group, place(group, number - distance), bytes / (2 * distance));
        else
            receive(group, place(group, number + distance), bytes / (2 * distance));
    }
}

static void gather_doubling(struct group *group, double bytes) {
    for (int distance = 1; distance < group->ranks; distance *= 2)
        exchange(group, group->rank, distance, bytes * distance / group->ranks);
}

static void bruck(struct group *group, double bytes) {
    for (int distance = 1; distance < group->ranks; distance *= 2) {
        int left = group->ranks - distance;
        shift(group, distance, bytes / group->ranks * (left < distance ? left : distance));
    }
}

static void ring(struct group *group, double bytes, int rounds) {
    for (int round = 0; round < rounds; round++)
        shift(group, 1, bytes / group->ranks);
}

static void neighbours(struct group *group, double bytes) {
    for (int round = 0; round < group->ranks / 2; round++) {
        int other = (group->rank + group->ranks + (group->rank % 2 == round % 2 ? 1 : -1)) % group->ranks;
        swap(group, other, other, 2.0 * bytes / group->ranks);
    }
}

/* A segment is sent on while the next one comes. */
static void chain(struct group *group, double bytes) {
    int segments = (int)((bytes + SEGMENT - 1) / SEGMENT), rank = group->rank;
    int before = rank > 0 ? rank - 1 : MPI_PROC_NULL, after = rank < group->ranks - 1 ? rank + 1 : MPI_PROC_NULL;
    segments = segments > 0 ? segments : 1;
    swap(group, MPI_PROC_NULL, before, bytes / segments);
    for (int segment = 1; segment < segments; segment++)
        swap(group, after, before, bytes / segments);
    swap(group, after, MPI_PROC_NULL, bytes / segments);
}

static void barrier(struct group *group) {
    for (int distance = 1; distance < group->ranks; distance *= 2)
        shift(group, distance, 0.0);
}

static void collective(struct group *group, const char *name, double bytes) {
    if (strcmp(name, "doubling") == 0)
        doubling(group, bytes);
    else if (strcmp(name, "rabenseifner") == 0)
        rabenseifner(group, bytes);
    else if (strcmp(name, "ring_sum") == 0)
        ring(group, bytes, 2 * (group->ranks - 1));
    else if (strcmp(name, "ring") == 0)
        ring(group, bytes, group->ranks - 1);
    else if (strcmp(name, "tree") == 0)
        down(group, bytes, 0.0);
    else if (strcmp(name, "gathered_tree") == 0)
        up(group, 0.0, bytes / group->ranks);
    else if (strcmp(name, "halving_tree") == 0)
        halving_tree(group, bytes);
    else if (strcmp(name, "gather_doubling") == 0)
        gather_doubling(group, bytes);
    else if (strcmp(name, "bruck") == 0)
        bruck(group, bytes);
    else if (strcmp(name, "neighbours") == 0)
        neighbours(group, bytes);
    else if (strcmp(name, "chain") == 0)
        chain(group, bytes);
    else if (strcmp(name, "barrier") == 0)
        barrier(group);
    else if (strncmp(name, "scatter_", 8) == 0) {
        down(group, 0.0, bytes / group->ranks);
        if (strcmp(name, "scatter_ring") == 0)
            ring(group, bytes, group->ranks - 1);
        else
            gather_doubling(group, bytes);
    } else
        MPI_Abort(MPI_COMM_WORLD, 3);
}

/* Micro-batches from rank to rank of the group: each is computed on, then sent on. */
static void pipeline(struct group *group, const struct step *step) {
    for (int number = 0; number < step->times; number++) {
        if (group->rank > 0)
            receive(group, group->rank - 1, step->bytes);
        compute(step->seconds);
        if (group->rank < group->ranks - 1)
            send(group, group->rank + 1, step->bytes);
    }
}

static double do_step(struct group *group, const struct step *step) {
    double start = MPI_Wtime();
    if (strcmp(step->algorithm, "compute") == 0) {
        compute(step->seconds);
        return MPI_Wtime() - start;
    }
    if (strcmp(step->algorithm, "pipeline") == 0) {
        pipeline(group, step);
        return MPI_Wtime() - start;
    }
    int done = step->times < ENOUGH ? step->times : ENOUGH;
    double last = start;
    for (int number = 0; number < done; number++) {
        last = MPI_Wtime();
        /* What the call costs before MPI has it. */
        compute(step->seconds);
        collective(group, step->algorithm, step->bytes);
    }
    /* The first one also waits for ranks that come late, as those that are left out do not. */
    double stop = MPI_Wtime();
    return stop - start + (step->times - done) * (stop - last);
}

static int read_plan(const char *path, int *replicas, struct step *steps) {
    FILE *file = fopen(path, "r");
    if (file == NULL || fscanf(file, "%d", replicas) != 1)
        return -1;
    int count = 0;
    while (count < STEPS) {
        struct step *step = &steps[count];
        if (fscanf(file, "%31s %15s %lf %d %lf", step->algorithm, step->group, &step->bytes, &step->times,
                   &step->seconds) != 5)
            break;
        count++;
    }
    fclose(file);
    return count;
}

/* At most: parts of a ring are small, where the whole may be larger than any memory. */
static double longest_message(const struct step *step) {
    int ranks;
    MPI_Comm_size(MPI_COMM_WORLD, &ranks);
    int is_ring = strncmp(step->algorithm, "ring", 4) == 0 || strcmp(step->algorithm, "neighbours") == 0;
    return is_ring && strcmp(step->group, "world") == 0 ? 2.0 * step->bytes / ranks : step->bytes;
}

static struct group group_of(MPI_Comm comm, char *from, char *to) {
    struct group group = {comm, 0, 0, 1, from, to};
    MPI_Comm_rank(comm, &group.rank);
    MPI_Comm_size(comm, &group.ranks);
    while (2 * group.power <= group.ranks)
        group.power *= 2;
    return group;
}

int main(int argc, char **argv) {
    MPI_Init(&argc, &argv);
    int rank, replicas;
    struct step steps[STEPS];
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    int count = argc == 2 ? read_plan(argv[1], &replicas, steps) : -1;
    if (count < 1)
        MPI_Abort(MPI_COMM_WORLD, 2);
    double largest = 1.0;
    for (int number = 0; number < count; number++)
        largest = longest_message(&steps[number]) > largest ? longest_message(&steps[number]) : largest;
    /* One piece for all ranks: nobody looks at what is in it. */
    char *from = SMPI_SHARED_MALLOC(2 * (size_t)largest), *to = SMPI_SHARED_MALLOC(2 * (size_t)largest);
    MPI_Comm replica, stage;
    MPI_Comm_split(MPI_COMM_WORLD, rank % replicas, rank, &replica);
    MPI_Comm_split(MPI_COMM_WORLD, rank / replicas, rank, &stage);
    struct group world = group_of(MPI_COMM_WORLD, from, to), of_replica = group_of(replica, from, to);
    struct group of_stage = group_of(stage, from, to);
    double own[STEPS + 1], most[STEPS + 1];
    for (int iteration = 0; iteration < 2; iteration++) {
        MPI_Barrier(MPI_COMM_WORLD);
        own[count] = 0.0;
        for (int number = 0; number < count; number++) {
            const char *name = steps[number].group;
            struct group *group = strcmp(name, "replica") == 0 ? &of_replica : &world;
            group = strcmp(name, "stage") == 0 ? &of_stage : group;
            own[number] = do_step(group, &steps[number]);
            own[count] += own[number];
        }
    }
    MPI_Reduce(own, most, count + 1, MPI_DOUBLE, MPI_MAX, 0, MPI_COMM_WORLD);
    if (rank == 0)
        for (int number = 0; number <= count; number++)
            printf("%.9e\n", most[number]);
    SMPI_SHARED_FREE(from);
    SMPI_SHARED_FREE(to);
    MPI_Finalize();
    return 0;
}
