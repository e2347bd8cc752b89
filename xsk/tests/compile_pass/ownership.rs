//! What must go on compiling: packets and sockets move between threads, and a socket comes apart.

use std::thread::spawn;
use xsk::socket::RxTx;
use xsk::{Frame, Packet, Pool, Socket, Umem};

const _: () = assert!(size_of::<Frame>() == 8 && size_of::<Option<Frame>>() == 8);
const _: () = assert!(size_of::<Packet>() == 16 && size_of::<Option<Packet>>() == 16);

fn is_send<T: Send>() {}
fn is_sync<T: Sync>() {}

fn packet_moves(packet: Packet) {
    spawn(move || packet[0]);
}

fn socket_moves(mut socket: RxTx) {
    spawn(move || socket.rx.take(1).count());
}

fn socket_is_split(RxTx { socket, fill, rx, tx, completion }: RxTx) {
    spawn(move || drop((fill, rx)));
    spawn(move || drop((tx, completion)));
    drop(socket);
}

fn main() {
    is_send::<(Frame, Packet, Pool, Umem, Socket, RxTx)>();
    is_sync::<(Frame, Packet, Umem, Socket)>();
    let _ = (packet_moves, socket_moves, socket_is_split);
}
