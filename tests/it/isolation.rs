//! Two tenants: nothing of one is ever seen by the other.

use switchboard::api::grpc::proto;
use tonic::Code;

use crate::harness::World;

const ONE: &str = "15552000001";
const TWO: &str = "15552000002";
const CUSTOMER: &str = "15552000099";

#[tokio::test(flavor = "multi_thread")]
async fn numbers_of_two_tenants_see_nothing_of_each_other() {
    let world = World::new().await;
    let (first, _, ones) = world.tenant("first", &[ONE]).await;
    let (second, _, twos) = world.tenant("second", &[TWO]).await;
    let (one, two) = (&ones[0], &twos[0]);
    world.phones.write(CUSTOMER, ONE, "for one").await.unwrap();
    world.phones.write(CUSTOMER, TWO, "for two").await.unwrap();
    world.webhook(one, "message.received", |hook| hook.body["data"]["content"] == "for one").await;
    world.webhook(two, "message.received", |hook| hook.body["data"]["content"] == "for two").await;
    for received in world.sink.received() {
        assert_eq!(received.body["data"]["numberId"], received.subscription.as_str());
    }
    for (number, own, other) in [(one, "for one", "for two"), (two, "for two", "for one")] {
        let request = proto::ListMessagesRequest::default();
        let history = number.caller.messages().list_messages(request).await.unwrap().into_inner().messages;
        assert!(history.iter().any(|message| message.text == own));
        assert!(history.iter().all(|message| message.text != other));
    }
    let foreign = proto::GetNumberRequest { number: two.id.clone() };
    let missing = proto::GetNumberRequest { number: "num_0000000000000".to_owned() };
    let foreign = first.numbers().get_number(foreign).await.unwrap_err();
    let missing = first.numbers().get_number(missing).await.unwrap_err();
    assert_eq!((foreign.code(), foreign.message()), (missing.code(), missing.message()));
    assert_eq!(foreign.code(), Code::NotFound);
    let listed = second.numbers().list_numbers(proto::ListNumbersRequest::default()).await.unwrap().into_inner();
    assert_eq!(listed.numbers.iter().map(|number| number.id.as_str()).collect::<Vec<_>>(), [two.id.as_str()]);
    let metrics = world.metrics().await;
    assert!(metrics.contains(&one.id) && !metrics.contains(ONE) && !metrics.contains(CUSTOMER));
}
